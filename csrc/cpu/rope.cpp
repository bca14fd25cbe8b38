// Rotary embeddings, alone and fused with the norm of queries and keys, forward and backward.
#include "kvkeye/rope.h"
#include "kvkeye/common/simd_double.h"

#include <cmath>

namespace kvkeye::KVKEYE_ISA {
namespace {

// cos and sin of one token, [dim / 2] each, with room to store whole vectors.
struct Turn {
  float cos[kMaxHeadDim / 2], sin[kMaxHeadDim / 2];
};
static_assert(kMaxHeadDim / 2 % kLanes == 0, "whole vectors");

KVKEYE_INLINE void turn_of(const SectionedAngles& angles, int64_t token, Turn& turn) {
  float angle[kMaxHeadDim / 2];
  int64_t size = 0;
  for (int axis = 0; axis < 3; ++axis) {
    const float position = (float)angles.positions[axis * angles.tokens + token];
    for (const int64_t end = size + angles.sections[axis]; size < end; ++size)
      angle[size] = position * angles.frequency[size];
  }
  for (int64_t i = size; i % kDoubles != 0; ++i)
    angle[i] = 0.0f;
  for (int64_t i = 0; i < size; i += kDoubles) {
    Vnarrow part;
    std::memcpy(&part, angle + i, sizeof part);
    const SineCosine found = sine_cosine(__builtin_convertvector(part, Vd));
    const Vnarrow sine = __builtin_convertvector(found.sine, Vnarrow),
                  cosine = __builtin_convertvector(found.cosine, Vnarrow);
    std::memcpy(turn.sin + i, &sine, sizeof sine);
    std::memcpy(turn.cos + i, &cosine, sizeof cosine);
  }
}

// y = x turned by the angles, or back. x and y may be the same head.
template <class X, class Y>
KVKEYE_INLINE void turn_head(const X* x, const float* cos, const float* sin, bool inverse, int64_t half,
                             Y* y) {
  for_vectors(half, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
    const Vf c = load(cos + i, lanes), straight = load(sin + i, lanes);
    const Vf s = inverse ? -straight : straight;
    const Vf first = load(x + i, lanes), second = load(x + half + i, lanes);
    store(y + i, first * c - second * s, lanes);
    store(y + half + i, second * c + first * s, lanes);
  });
}

template <class T>
KVKEYE_INLINE void turn_heads(const RotateParams<T>& p, int64_t token, const float* cos, const float* sin) {
  for (int64_t head = 0; head < p.heads; ++head) {
    const T* x = p.x + token * p.token_stride + head * p.head_stride;
    turn_head(x, cos, sin, p.inverse, p.dim / 2, p.y + (token * p.heads + head) * p.dim);
  }
}

template <class T> KVKEYE_INLINE float inverse_root(const T* x, int64_t dim, float eps) {
  const float squares = sum_vectors(dim, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
    const Vf value = load(x + i, lanes);
    return value * value;
  });
  return 1.0f / std::sqrt(squares / (float)dim + eps);
}

template <class T>
KVKEYE_INLINE void norm_and_turn(const T* x, const T* weight, const Turn& turn, int64_t dim, float eps,
                                 T* y) {
  float normed[kMaxHeadDim];
  const float scale = inverse_root(x, dim, eps);
  for_vectors(dim, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
    const Vf value = rounded<T>(load(x + i, lanes) * scale) * load(weight + i, lanes);
    store(normed + i, rounded<T>(value), lanes);
  });
  turn_head(normed, turn.cos, turn.sin, false, dim / 2, y);
}

// Keys of one token to their output or, with the values, to their slot.
template <class T>
KVKEYE_INLINE void write_keys(const QkNormMropeParams<T>& p, int64_t token, const T* keys, const Turn& turn) {
  const int64_t slot = p.k_cache == nullptr ? 0 : p.slot_mapping[token];
  if (slot < 0)
    return;
  for (int64_t head = 0; head < p.num_kv_heads; ++head) {
    const T* key = keys + head * p.dim;
    if (p.k_cache == nullptr) {
      T* target = p.k + (token * p.num_kv_heads + head) * p.dim;
      norm_and_turn(key, p.k_weight, turn, p.dim, p.eps, target);
      continue;
    }
    const int64_t row = (slot / p.block_size * p.num_kv_heads + head) * p.block_size + slot % p.block_size;
    norm_and_turn(key, p.k_weight, turn, p.dim, p.eps, p.k_cache + row * p.dim);
    std::memcpy(p.v_cache + row * p.dim, key + p.num_kv_heads * p.dim, p.dim * sizeof(T));
  }
}

// One head of the backward pass. With g the gradient turned back, n the normed head and w = g * weight:
// grad_x = scale (w - n mean(w n)); g n is added to the head's share of the weight gradient.
template <class T>
KVKEYE_INLINE void norm_and_turn_backward(const T* grad, const T* x, const T* weight, const Turn& turn,
                                          int64_t dim, float eps, T* grad_x, float* share) {
  float back[kMaxHeadDim];
  turn_head(grad, turn.cos, turn.sin, true, dim / 2, back);
  const float scale = inverse_root(x, dim, eps);
  const float along =
      sum_vectors(dim,
                  [&](int64_t i, int lanes) KVKEYE_LAMBDA {
                    return load(back + i, lanes) * load(weight + i, lanes) * (load(x + i, lanes) * scale);
                  }) /
      (float)dim;
  for_vectors(dim, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
    const Vf normed = load(x + i, lanes) * scale, upstream = load(back + i, lanes);
    store(grad_x + i, (upstream * load(weight + i, lanes) - normed * along) * scale, lanes);
    store(share + i, load(share + i, lanes) + upstream * normed, lanes);
  });
}

KVKEYE_INLINE void fill_zero(float* target, int64_t size) {
  for_vectors(size, [&](int64_t i, int lanes) KVKEYE_LAMBDA { store(target + i, Vf{}, lanes); });
}

} // namespace

template <class T> void rotate(const RotateParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token)
    turn_heads(p, token, p.cos + token * (p.dim / 2), p.sin + token * (p.dim / 2));
}

template <class T> void mrope(const MropeParams<T>& p, int64_t begin, int64_t end) {
  Turn turn;
  for (int64_t token = begin; token < end; ++token) {
    turn_of(p.angles, token, turn);
    turn_heads(p.rotate, token, turn.cos, turn.sin);
  }
}

template <class T> void qk_norm_mrope(const QkNormMropeParams<T>& p, int64_t begin, int64_t end) {
  Turn turn;
  for (int64_t token = begin; token < end; ++token) {
    turn_of(p.angles, token, turn);
    const T* heads = p.qkv + token * p.stride;
    T* q = p.q + token * p.num_q_heads * p.dim;
    for (int64_t head = 0; head < p.num_q_heads; ++head)
      norm_and_turn(heads + head * p.dim, p.q_weight, turn, p.dim, p.eps, q + head * p.dim);
    write_keys(p, token, heads + p.num_q_heads * p.dim, turn);
  }
}

template <class T>
void qk_norm_mrope_backward(const QkNormMropeBackwardParams<T>& p, int64_t begin, int64_t end) {
  Turn turn;
  const int64_t heads = p.num_q_heads + p.num_kv_heads;
  for (int64_t token = begin; token < end; ++token) {
    turn_of(p.angles, token, turn);
    T* out = p.grad_qkv + token * (heads + p.num_kv_heads) * p.dim;
    float* share = p.partial + token * 2 * p.dim;
    fill_zero(share, 2 * p.dim);
    for (int64_t head = 0; head < heads; ++head) {
      const bool key = head >= p.num_q_heads;
      const T* grad = key ? p.grad_k + (token * p.num_kv_heads + head - p.num_q_heads) * p.dim
                          : p.grad_q + (token * p.num_q_heads + head) * p.dim;
      norm_and_turn_backward(grad, p.qkv + token * p.stride + head * p.dim, key ? p.k_weight : p.q_weight,
                             turn, p.dim, p.eps, out + head * p.dim, share + (key ? p.dim : 0));
    }
    for_vectors(p.num_kv_heads * p.dim,
                [&](int64_t i, int lanes) KVKEYE_LAMBDA { store(out + heads * p.dim + i, Vf{}, lanes); });
  }
}

template <class T>
void qk_norm_mrope_backward_columns(const QkNormMropeBackwardParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block)
    sum_rows(block, 2 * p.dim, p.angles.tokens, p.grad_weights,
             [&](int64_t row, int64_t i, int lanes)
                 KVKEYE_LAMBDA { return load(p.partial + row * 2 * p.dim + i, lanes); });
}

KVKEYE_INSTANTIATE(rotate, RotateParams)
KVKEYE_INSTANTIATE(mrope, MropeParams)
KVKEYE_INSTANTIATE(qk_norm_mrope, QkNormMropeParams)
KVKEYE_INSTANTIATE(qk_norm_mrope_backward, QkNormMropeBackwardParams)
KVKEYE_INSTANTIATE(qk_norm_mrope_backward_columns, QkNormMropeBackwardParams)

} // namespace kvkeye::KVKEYE_ISA

// Rotary embeddings, alone and fused with the norm of queries and keys, forward and backward.
#include "kvkeye/rope.h"
#include "kvkeye/common/simd_double.h"
#include "norm_math.h"

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

template <class V> struct Halves {
  V first, second;
};

template <class V>
KVKEYE_INLINE Halves<V> turned(const V& first, const V& second, const V& cos, const V& sin) {
  return {first * cos - second * sin, second * cos + first * sin};
}

// y = x turned by the angles, or back. x and y may be the same head.
template <class X, class Y>
KVKEYE_INLINE void turn_head(const X* x, const float* cos, const float* sin, bool inverse, int64_t half,
                             Y* y) {
  for_vectors(half, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
    const Vf straight = load(sin + i, lanes);
    const Halves<Vf> turn = turned(load(x + i, lanes), load(x + half + i, lanes), load(cos + i, lanes),
                                   inverse ? -straight : straight);
    store(y + i, turn.first, lanes);
    store(y + half + i, turn.second, lanes);
  });
}

template <class T>
KVKEYE_INLINE void turn_heads(const RotateParams<T>& p, int64_t token, const float* cos, const float* sin) {
  for (int64_t head = 0; head < p.heads; ++head) {
    const T* x = p.x + token * p.token_stride + head * p.head_stride;
    turn_head(x, cos, sin, p.inverse, p.dim / 2, p.y + (token * p.heads + head) * p.dim);
  }
}

// The norm and rotation of queries, or of keys; weight, cos and sin by halves in the order of pairs.
struct NormTurn {
  const float* weight;
  const Turn* turn;
  int64_t half;
  float eps;
};

// The weights of a norm as numbers, each half in the order of pairs.
template <class T> KVKEYE_INLINE void order_weight(const T* weight, int64_t half, float* target) {
  for_vectors(2 * half,
              [&](int64_t i, int lanes) KVKEYE_LAMBDA { store(target + i, load(weight + i, lanes), lanes); });
  order_as_pairs<T>(target, half);
  order_as_pairs<T>(target + half, half);
}

// Rounded as the norm and the rotation would store them. `at` loads a pair, or a vector or a part of one.
template <class T, class At>
KVKEYE_INLINE auto norm_and_turn_at(const NormTurn& p, const T* x, float scale, int64_t i, const At& at) {
  const auto first = rounded<T>(rounded<T>(at(x + i) * scale) * at(p.weight + i));
  const auto second = rounded<T>(rounded<T>(at(x + p.half + i) * scale) * at(p.weight + p.half + i));
  return turned(first, second, at(p.turn->cos + i), at(p.turn->sin + i));
}

template <class T> KVKEYE_INLINE void norm_and_turn(const NormTurn& p, const T* x, float scale, T* y) {
  for_pairs(
      0, p.half,
      [&](int64_t i) KVKEYE_LAMBDA {
        const Halves<Pair> out = norm_and_turn_at(
            p, x, scale, i, [](const auto* source) KVKEYE_LAMBDA { return load_pair(source); });
        store_pair(y + i, out.first);
        store_pair(y + p.half + i, out.second);
      },
      [&](int64_t i, int lanes) KVKEYE_LAMBDA {
        const Halves<Vf> out = norm_and_turn_at(
            p, x, scale, i, [&](const auto* source) KVKEYE_LAMBDA { return load(source, lanes); });
        store(y + i, out.first, lanes);
        store(y + p.half + i, out.second, lanes);
      });
}

// Heads side by side, each to target(head). The roots of as many as a vector has lanes are taken at once.
template <class T, class Target>
KVKEYE_INLINE void norm_and_turn_heads(const NormTurn& p, const T* x, int64_t heads, Target target) {
  const int64_t dim = 2 * p.half;
  for (int64_t first = 0; first < heads; first += kLanes) {
    const int64_t count = first + kLanes < heads ? kLanes : heads - first;
    float scale[kLanes] = {};
    for (int64_t i = 0; i < count; ++i)
      scale[i] = sum_of_squares(x + (first + i) * dim, dim);
    for (float& value : scale)
      value = inverse_root(value, dim, p.eps);
    for (int64_t i = 0; i < count; ++i)
      norm_and_turn(p, x + (first + i) * dim, scale[i], target(first + i));
  }
}

// Keys of one token to their output or, with the values, to their slot.
template <class T>
KVKEYE_INLINE void write_keys(const QkNormMropeParams<T>& p, int64_t token, const T* keys,
                              const NormTurn& norm_turn) {
  const int64_t heads = p.num_kv_heads;
  if (p.k_cache == nullptr)
    return norm_and_turn_heads(norm_turn, keys, heads, [&](int64_t head) KVKEYE_LAMBDA {
      return p.k + (token * heads + head) * p.dim;
    });
  const int64_t slot = p.slot_mapping[token];
  if (slot < 0)
    return;
  const int64_t first = slot / p.block_size * heads * p.block_size + slot % p.block_size;
  norm_and_turn_heads(norm_turn, keys, heads, [&](int64_t head) KVKEYE_LAMBDA {
    return p.k_cache + (first + head * p.block_size) * p.dim;
  });
  for (int64_t head = 0; head < heads; ++head)
    std::memcpy(p.v_cache + (first + head * p.block_size) * p.dim, keys + (heads + head) * p.dim,
                p.dim * sizeof(T));
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
  float q_weight[kMaxHeadDim], k_weight[kMaxHeadDim];
  const int64_t half = p.dim / 2;
  order_weight(p.q_weight, half, q_weight);
  order_weight(p.k_weight, half, k_weight);
  for (int64_t token = begin; token < end; ++token) {
    turn_of(p.angles, token, turn);
    order_as_pairs<T>(turn.cos, half);
    order_as_pairs<T>(turn.sin, half);
    const T* heads = p.qkv + token * p.stride;
    T* q = p.q + token * p.num_q_heads * p.dim;
    norm_and_turn_heads(NormTurn{q_weight, &turn, half, p.eps}, heads, p.num_q_heads,
                        [&](int64_t head) KVKEYE_LAMBDA { return q + head * p.dim; });
    write_keys(p, token, heads + p.num_q_heads * p.dim, NormTurn{k_weight, &turn, half, p.eps});
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

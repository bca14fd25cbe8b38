// tile_attention: tensors to Params to kernels.
#include "kvkeye/video_fusion_attention.h"
#include "heads.h"
#include "tile_plan.h"

namespace kvkeye {
namespace {

// [B, S, H, D] whose last axis is contiguous.
struct Tokens {
  Tensor tensor;
  TokenStrides strides;
};

Tokens as_tokens(const Tensor& x) {
  const Tensor tensor = x.stride(3) == 1 || x.size(3) == 1 ? x : torch::stable::contiguous(x);
  return {tensor, {tensor.stride(0), tensor.stride(1), tensor.stride(2)}};
}

// The arguments that both directions share, checked.
struct Call {
  Tokens q, k, v;
  Tensor starts, weights;
  int64_t batch, tokens, heads, dim, lse_size;
  TilePlan plan;

  Call(const char* op, const Tensor& queries, const Tensor& keys, const Tensor& values, const Tensor& at,
       const Tensor& with, int64_t frames, int64_t text)
      : q(checked(op, "q", queries, queries)), k(checked(op, "k", keys, queries)),
        v(checked(op, "v", values, queries)), starts(dense(at)), weights(dense(with)), batch(queries.size(0)),
        tokens(queries.size(1)), heads(queries.size(2)), dim(queries.size(3)),
        lse_size(with.numel() * per_frame(op, tokens, frames, text) + text),
        plan(checked_starts(op, starts, weights, frames), read<float>(weights), weights.size(0),
             weights.size(1), frames, per_frame(op, tokens, frames, text), tokens, dim) {}

  static Tokens checked(const char* op, const char* name, const Tensor& x, const Tensor& like) {
    Argument{op, name, x}.has_dim(4, "[B, S, H, D]");
    Argument{op, name, x}.has_shape_of("q", like);
    Argument{op, name, x}.has_dtype(like.scalar_type());
    return as_tokens(x);
  }

  static int64_t per_frame(const char* op, int64_t tokens, int64_t frames, int64_t text) {
    require(frames > 0 && text >= 0 && text <= tokens && (tokens - text) % frames == 0, op, ": ", tokens,
            " tokens less ", text, " of text are not ", frames, " frames of equal size.");
    return (tokens - text) / frames;
  }

  static const int32_t* checked_starts(const char* op, const Tensor& starts, const Tensor& weights,
                                       int64_t frames) {
    Argument{op, "weights", weights}.has_dim(2, "[J, n]");
    Argument{op, "weights", weights}.has_dtype(ScalarType::Float);
    Argument{op, "starts", starts}.has_shape({weights.size(0)});
    Argument{op, "starts", starts}.has_dtype(ScalarType::Int);
    require(weights.size(1) <= frames, op, ": tiles of ", weights.size(1),
            " frames are longer than the video of ", frames, ".");
    return read<int32_t>(starts);
  }

  template <class T> TileAttentionParams<T> params(double softmax_scale) const {
    TileAttentionParams<T> made{};
    made.q = read<T>(q.tensor);
    made.k = read<T>(k.tensor);
    made.v = read<T>(v.tensor);
    made.tiling = plan.geometry;
    made.q_strides = q.strides;
    made.k_strides = k.strides;
    made.v_strides = v.strides;
    made.heads = heads;
    made.dim = dim;
    made.lse_size = lse_size;
    made.softmax_scale = (float)softmax_scale;
    return made;
  }
};

std::tuple<Tensor, Tensor> tile_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                          const Tensor& starts, const Tensor& weights, int64_t num_frames,
                                          int64_t num_text_tokens, double softmax_scale) {
  const Call call("tile_attention", q, k, v, starts, weights, num_frames, num_text_tokens);
  const Tensor o = empty_dense(q), lse = empty(q, {call.batch, call.heads, call.lse_size}, ScalarType::Float);
  with_type({"tile_attention", "q", q}, [&](auto type) {
    using T = decltype(type);
    auto params = call.params<T>(softmax_scale);
    params.o = write<T>(o);
    params.lse = write<float>(lse);
    const int64_t cost = params.tiling.most_rows * call.tokens * call.dim;
    for_items_with_scratch(
        params, call.batch * call.heads * params.tiling.num_blocks, cost,
        tile_attention_scratch(params.tiling, call.dim),
        [](const auto& p, int64_t begin, int64_t end) { cpu::tile_attention(p, begin, end); });
  });
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor>
tile_attention_backward(const Tensor& grad_o, const Tensor& grad_lse, const Tensor& q, const Tensor& k,
                        const Tensor& v, const Tensor& starts, const Tensor& weights, int64_t num_frames,
                        int64_t num_text_tokens, double softmax_scale, const Tensor& lse) {
  constexpr const char* op = "tile_attention_backward";
  const Call call(op, q, k, v, starts, weights, num_frames, num_text_tokens);
  Argument{op, "grad_o", grad_o}.has_shape_of("q", q);
  Argument{op, "grad_o", grad_o}.has_dtype(q.scalar_type());
  for (const Argument& argument : {Argument{op, "grad_lse", grad_lse}, Argument{op, "lse", lse}}) {
    argument.has_shape({call.batch, call.heads, call.lse_size});
    argument.has_dtype(ScalarType::Float);
  }
  const Tensor upstream = dense(grad_o), upstream_lse = dense(grad_lse);
  const Tensor grad_q = empty_dense(q), grad_k = empty_dense(k), grad_v = empty_dense(v);
  const int64_t sequences = call.batch * call.heads, places = weights.numel();
  const Tensor by_sequence = empty(call.weights, {sequences, places}, ScalarType::Double),
               grad_weights = empty_dense(weights);
  with_type({op, "q", q}, [&](auto type) {
    using T = decltype(type);
    TileAttentionBackwardParams<T> params{};
    params.forward = call.params<T>(softmax_scale);
    params.grad_o = read<T>(upstream);
    params.grad_lse = read<float>(upstream_lse);
    params.grad_q = write<T>(grad_q);
    params.grad_k = write<T>(grad_k);
    params.grad_v = write<T>(grad_v);
    params.grad_weights = write<double>(by_sequence);
    const int64_t floats = tile_attention_backward_scratch(params.forward.tiling, call.dim);
    for_items(sequences, call.tokens * call.tokens * call.dim, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<float[]> scratch(new float[floats]);
      auto mine = params;
      mine.forward.scratch = scratch.get();
      cpu::tile_attention_backward(mine, begin, end);
    });
  });
  const double* found = read<double>(by_sequence);
  for (int64_t place = 0; place < places; ++place) { // in one order
    double total = 0.0;
    for (int64_t sequence = 0; sequence < sequences; ++sequence)
      total += found[sequence * places + place];
    write<float>(grad_weights)[place] = (float)total;
  }
  return {grad_q, grad_k, grad_v, grad_weights};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cpu, CPU, m) {
  m.impl("tile_attention", TORCH_BOX(&tile_attention));
  m.impl("tile_attention_backward", TORCH_BOX(&tile_attention_backward));
}

} // namespace kvkeye

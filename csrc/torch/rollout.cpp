// Scores of candidates: tensors to Params to kernels.
#include "kvkeye/rollout.h"
#include "heads.h"

namespace kvkeye {
namespace {

std::tuple<Tensor, Tensor, Tensor> score_candidates(const Tensor& x, const Tensor& v, double sigma,
                                                    const Tensor& guide, int64_t grid) {
  constexpr const char* op = "score_candidates";
  Argument{op, "x", x}.has_dim(5, "[N, C, T, h, w]");
  Argument{op, "v", v}.has_shape_of("x", x);
  Argument{op, "v", v}.has_dtype(x.scalar_type());
  Argument{op, "guide", guide}.has_shape({x.size(1), x.size(3), x.size(4)});
  Argument{op, "guide", guide}.has_dtype(ScalarType::Float);
  require(grid >= 1 && grid <= x.size(3) && grid <= x.size(4), op, ": grid is ", grid, "; the frames are ",
          x.size(3), " by ", x.size(4), ".");
  const Tensor state = dense(x), velocity = dense(v), target = dense(guide);
  const Tensor cells = empty(guide, {x.size(1), grid * grid}), means = empty(guide, {x.size(1)});
  const std::vector<int64_t> shape{x.size(0), x.size(2)};
  const Tensor similarity = empty(guide, shape), motion = empty(guide, shape), drift = empty(guide, shape);
  with_type({op, "x", x}, [&](auto type) {
    using T = decltype(type);
    ScoreCandidatesParams<T> params{};
    params.x = read<T>(state);
    params.v = read<T>(velocity);
    params.guide = read<float>(target);
    params.guide_cells = write<float>(cells);
    params.guide_means = write<float>(means);
    params.similarity = write<float>(similarity);
    params.motion = write<float>(motion);
    params.drift = write<float>(drift);
    params.channels = x.size(1);
    params.frames = x.size(2);
    params.height = x.size(3);
    params.width = x.size(4);
    params.grid = grid;
    params.sigma = (float)sigma;
    const int64_t plane = params.height * params.width, scratch = score_scratch(params.width, grid);
    for_items_with_scratch(params, params.channels, plane, scratch,
                           [](const auto& p, int64_t begin, int64_t end) { cpu::pool_guide(p, begin, end); });
    for_items_with_scratch(
        params, x.size(0) * params.frames, 4 * params.channels * plane, scratch,
        [](const auto& p, int64_t begin, int64_t end) { cpu::score_candidates(p, begin, end); });
  });
  return {similarity, motion, drift};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cpu, CPU, m) {
  m.impl("score_candidates", TORCH_BOX(&score_candidates));
}

} // namespace kvkeye

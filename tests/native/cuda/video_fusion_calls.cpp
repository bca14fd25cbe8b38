#include "case.h"
#include "kvkeye/video_fusion_cuda.h"

using namespace kvkeye;

namespace {

template <class T> int fuse(host_cuda::Case& c) {
  const FuseTilesCudaParams<T> p{
      c.buffer<T>("outputs"),     c.buffer<int32_t>("starts"),
      c.buffer<float>("weights"), c.number("state") != 0 ? c.buffer<float>("latent") : nullptr,
      c.buffer<float>("out"),     c.number("branches"),
      c.number("tiles"),          c.number("channels"),
      c.number("length"),         c.number("frames"),
      c.number("plane"),          (float)c.number("guidance") / 4,
      (float)c.number("step") / 4};
  return cuda::fuse_tiles(p, nullptr);
}

} // namespace

KVKEYE_CALL(fuse_tiles) {
  return c.number("bf16") != 0 ? fuse<bf16>(c) : fuse<float>(c);
}

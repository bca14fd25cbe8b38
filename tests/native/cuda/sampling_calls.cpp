#include "case.h"
#include "kvkeye/sampling_cuda.h"

using namespace kvkeye;

namespace {

template <class T> int sample(host_cuda::Case& c) {
  SampleCudaParams<T> p{};
  p.logits = c.buffer<T>("logits");
  p.temperature = c.buffer<float>("temperature");
  p.top_p = c.buffer<float>("top_p");
  p.min_p = c.buffer<float>("min_p");
  p.top_k = c.buffer<int32_t>("top_k");
  p.repetition = c.buffer<float>("repetition");
  p.presence = c.buffer<float>("presence");
  p.frequency = c.buffer<float>("frequency");
  p.history = c.buffer<int32_t>("history");
  p.cu_history = c.buffer<int32_t>("cu_history");
  p.num_prompt = c.buffer<int32_t>("num_prompt");
  p.seeds = c.buffer<int64_t>("seeds");
  p.positions = c.buffer<int64_t>("positions");
  p.sample_index = c.buffer<int64_t>("sample_index");
  p.mask = c.number("masked") != 0 ? c.buffer<int32_t>("mask") : nullptr;
  p.tokens = c.buffer<int64_t>("tokens");
  p.rows = c.number("rows");
  p.logits_stride = c.number("logits_stride");
  p.history_size = c.number("history_size");
  p.vocabulary = (int32_t)c.number("vocabulary");
  return cuda::sample(p, nullptr);
}

} // namespace

KVKEYE_CALL(sample) {
  return c.number("bf16") != 0 ? sample<bf16>(c) : sample<float>(c);
}

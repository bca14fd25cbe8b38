// Matrix product with one order of summation for every number of rows, and what follows it in a layer.
#include "kvkeye/linear.h"
#include "linear_finish.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

template <class T> void finish(const Item<LinearParams<T>>& item, int panel, const Part& rows) {
  finish_rows(item, panel, rows,
              [](const float* total, int64_t, int64_t, int) KVKEYE_LAMBDA { return load(total); });
}

template <class Product, class T> void run(const Item<LinearParams<T>>& item) {
  multiply_item<Product>(item, [&](int panel, const Part& rows) KVKEYE_LAMBDA { finish(item, panel, rows); });
}

// Without inputs there is no last chunk.
template <class T> void run_empty(const Item<LinearParams<T>>& item) {
  std::memset(item.scratch.total, 0, sizeof item.scratch.total);
  for (int panel = 0; panel < item.panels(); ++panel)
    finish(item, panel, {0, item.rows.count});
}

template <class T> KVKEYE_INLINE void run(const Item<LinearParams<T>>& item) {
  if (item.p.inputs == 0)
    return run_empty(item);
  if constexpr (sizeof(T) == 4) {
    run<Single>(item);
  } else {
#if defined(__AVX512BF16__)
    if (item.p.paired)
      return run<Paired>(item);
#endif
    run<Widened>(item);
  }
}

} // namespace

template <class T> void linear(const LinearParams<T>& p, int64_t begin, int64_t end) {
  Scratch scratch;
  for (int64_t i = begin; i < end; ++i)
    run(Item<LinearParams<T>>::of(p, scratch, i));
}

template <class T> void pack_weight(const PackWeightParams<T>& p, int64_t begin, int64_t end) {
  alignas(64) float words[kChunkWords * kPanel];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i / p.parts * kPanel, left = p.outputs - first;
    const Part outputs{first, left < kPanel ? left : kPanel};
    const auto rows = PanelRows<T>::at(p.weight + (i % p.parts * p.outputs + outputs.first) * p.weight_stride,
                                       p.weight_stride, outputs.count);
    for (int64_t k = 0; k < p.inputs; k += kInputChunk<T>) {
      const int count = chunk_at<T>(k, p.inputs);
      PanelRows<T>::pack(rows, k, count, words);
      for (int word = 0; word < words_of<T>(count); ++word)
        for (int64_t o = outputs.count; o < kPanel; ++o)
          words[word * kPanel + o] = 0.0f;
      std::memcpy((float*)p.packed + (i * p.words() + k / kPerWord<T>)*kPanel, words,
                  sizeof(float) * kPanel * words_of<T>(count));
    }
  }
}

KVKEYE_INSTANTIATE(linear, LinearParams)
KVKEYE_INSTANTIATE(pack_weight, PackWeightParams)

} // namespace kvkeye::KVKEYE_ISA

// Drawing the next token without sorting the vocabulary.
//
// Top-k needs no more than the maxima of blocks: at least k tokens reach the k-th largest of them, so that
// only blocks that reach it can hold one of the first k.
#include "kvkeye/sampling.h"
#include "sampling_accept.h"
#include "sampling_whole.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

// One row after the scan.
template <class T> struct Drawing {
  const SampleWorkspace& work;
  Row<T> row;
  int64_t blocks, num_penalised;
  double peak, temperature;
  Softmax softmax;
  double top_p, min_p, u;
  int64_t top_k;
};

template <class T>
KVKEYE_INLINE double peak_of(const Row<T>& row, const SampleWorkspace& work, int64_t num_penalised) {
  double peak = scan(row, work.peaks);
  for (int64_t i = 0; i < num_penalised; ++i) {
    const double value = work.penalised[i].value;
    peak = value > peak || value != value ? value : peak; // a NaN stays: nothing is larger
  }
  return peak;
}

template <class T> KVKEYE_INLINE int64_t first_at_peak(const Drawing<T>& d) {
  int64_t first = d.row.size;
  for (int64_t i = 0; i < d.num_penalised; ++i)
    if (d.work.penalised[i].value == d.peak && d.work.penalised[i].id < first)
      first = d.work.penalised[i].id;
  for (int64_t block = 0; block < d.blocks && block * kScanBlock < first; ++block)
    if (d.work.peaks[block] == d.peak)
      for (int64_t i = block * kScanBlock; i < first; ++i)
        if (d.row.shows(i) && value_of(d.row.logits[i]) == d.peak)
          return i;
  return first;
}

// The k-th largest maximum of a block. Tokens below it may still tie with it once they are probabilities,
// so the bound lies a little lower. It is finite: -inf has no probability.
template <class T> KVKEYE_INLINE float lower_bound(const Drawing<T>& d) {
  const double bound = kth_largest(d.work.peaks, d.blocks, d.top_k);
  double scale = fabs(bound) > fabs(d.peak) ? fabs(bound) : fabs(d.peak);
  scale = scale > d.temperature ? scale : d.temperature;
  const double low = bound - 0x1p-40 * scale - 0x1p-23 * fabs(bound); // the latter for rounding to fp32
  constexpr float kLargest = 0x1.fffffep127f;
  return low > -kLargest ? (float)low : -kLargest;
}

// Token at which the mass of `size` candidates, in vocabulary order, exceeds u times the total.
KVKEYE_INLINE int64_t invert(Candidate* c, int64_t size, double min_p, double u) {
  int64_t kept = 0;
  for (int64_t i = 0; i < size; ++i)
    if (c[i].value >= min_p && c[i].value > 0.0)
      c[kept++] = c[i];
  sort<ById>(c, kept);
  double total = 0.0, mass = 0.0;
  for (int64_t i = 0; i < kept; ++i)
    total += c[i].value;
  for (int64_t i = 0; i < kept; ++i) {
    mass += c[i].value;
    if (mass > u * total)
      return c[i].id;
  }
  return kept > 0 ? c[kept - 1].id : -1;
}

template <class T> int64_t draw_of_first(const Drawing<T>& d) {
  const float low = lower_bound(d);
  Candidate* c = d.work.candidates;
  int64_t found = gather_from(d.row, d.work.peaks, low, c);
  for (int64_t i = 0; i < d.num_penalised; ++i)
    if (d.work.penalised[i].value >= low)
      c[found++] = d.work.penalised[i];
  for (int64_t i = 0; i < found; ++i)
    c[i].value = d.softmax.of(c[i].value);
  int64_t kept = d.top_k < found ? d.top_k : found;
  select<ByRank>(c, found, kept);
  if (d.top_p < 1.0)
    kept = keep_share(c, kept, d.top_p);
  return invert(c, kept, d.min_p, d.u);
}

// The whole vocabulary takes part: work.row holds what may be drawn. Penalised tokens have their
// probabilities.
template <class T> void weigh_all(const Drawing<T>& d) {
  double* row = d.work.row;
  fill_probabilities(d.row, d.softmax, 0, d.row.size, row);
  for (int64_t i = 0; i < d.num_penalised; ++i)
    row[d.work.penalised[i].id] = d.work.penalised[i].value;
  truncate(row, d.work.candidates, d.row.size, d.top_k, d.top_p);
}

template <class T> int64_t draw(const SampleParams<T>& p, int64_t b) {
  int64_t num_penalised;
  const Row<T> row = row_of(p, b, num_penalised);
  const double peak = peak_of(row, p.work, num_penalised), temperature = p.temperature[b];
  if (!(fabs(peak) < INFINITY) || temperature != temperature)
    return -1;
  const double u = philox_uniform(p.seeds[b], p.positions[b], Draw::sample, p.sample_index[b]);
  const int64_t blocks = blocks_of(p.vocabulary, kScanBlock);
  const Softmax softmax = Softmax::of(peak, temperature);
  const Drawing<T> d{p.work,     row,        blocks, num_penalised, peak, temperature, softmax,
                     p.top_p[b], p.min_p[b], u,      p.top_k[b]};
  if (temperature == 0.0)
    return first_at_peak(d);
  const bool all = d.top_k <= 0 || d.top_k >= row.size;
  const bool is_usual =
      temperature > 0.0 && fabs(softmax.offset) < INFINITY && p.drafts.probability == nullptr;
  if (is_usual && !all && d.top_k <= blocks)
    return draw_of_first(d);
  for (int64_t i = 0; i < num_penalised; ++i)
    p.work.penalised[i].value = softmax.of(p.work.penalised[i].value);
  if (is_usual && all && FastSoftmax::fits(softmax)) {
    const WholeDraw<T> whole{row, p.work, num_penalised, softmax, FastSoftmax(softmax), d.min_p};
    const int64_t found = d.top_p < 1.0 ? whole.draw(d.top_p, u) : whole.draw(u);
    if (found != kUndecided)
      return found;
  }
  weigh_all(d);
  if (p.drafts.probability != nullptr)
    return accept(p.work.row, row.size, d.min_p, p.drafts, p.seeds[b], p.positions[b], p.sample_index[b]);
  return invert(p.work.row, row.size, d.min_p, d.u);
}

} // namespace

template <class T> void sample(const SampleParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b)
    p.tokens[b] = draw(p, b);
}

KVKEYE_INSTANTIATE(sample, SampleParams)

} // namespace kvkeye::KVKEYE_ISA

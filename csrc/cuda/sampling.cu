// Drawing the next token: one block of threads per row, one launch, nothing of the vocabulary's size in
// memory. The usual nucleus of at most 512 tokens is found in three walks over the logits and finished in
// shared memory; a wider one is cut in the vocabulary itself.
#include "kvkeye/common/philox.h"
#include "kvkeye/sampling_cuda.h"

#include "sampling_cut.h"

namespace kvkeye::cuda {
namespace {

struct Shared {
  Counts counts;
  CutMemory cut;
};

// What is left of a row after the walk for its peak.
struct Settings {
  bool limited, shared; // top-k, top-p
  int top_k;
  double top_p, min_p, u;
};

template <class T> __device__ Settings settings_of(const SampleCudaParams<T>& p, int64_t row) {
  return {p.top_k[row] > 0 && p.top_k[row] < p.vocabulary,
          p.top_p[row] < 1.0f,
          p.top_k[row],
          p.top_p[row],
          p.min_p[row],
          philox_uniform(p.seeds[row], p.positions[row], Draw::sample, p.sample_index[row])};
}

// The first thread for which it is true, or kBlockThreads.
__device__ int first_thread(BlockScratch& scratch, bool condition) {
  const int i = (int)threadIdx.x;
  return kBlockThreads - 1 - block_max(scratch, condition ? kBlockThreads - 1 - i : -1);
}

// From ranked candidates that hold everything kept. `total` is the whole row's mass, for top-p without top-k.
__device__ int64_t draw_from_candidates(CutMemory& memory, const Settings& given, int size, double total) {
  Candidates& candidates = memory.candidates;
  const int i = (int)threadIdx.x;
  const double mine = i < size ? candidates.probability[i] : 0.0;
  bool kept = i < (given.limited ? min(given.top_k, size) : size);
  if (given.shared) {
    const Scanned masses = block_scan(memory.scratch, kept ? mine : 0.0);
    kept = kept && (i == 0 || masses.upto - mine < given.top_p * (given.limited ? masses.all : total));
  }
  kept = kept && mine >= given.min_p;
  if (!kept) {
    candidates.probability[i] = 0.0;
    candidates.id[i] = 0x7fffffff;
  }
  int slots = 2;
  while (slots < size)
    slots *= 2;
  block_sort<true>(candidates, slots);
  const int count = __syncthreads_count(kept);
  const Scanned masses = block_scan(memory.scratch, i < count ? candidates.probability[i] : 0.0);
  const int chosen = first_thread(memory.scratch, i < count && masses.upto > given.u * masses.all);
  return candidates.id[min(chosen, count - 1)];
}

// The first token of the piece at which the mass exceeds the target, or the last one kept there.
template <class T>
__device__ int token_in_piece(const Row<T>& row, const Cut& cut, double min_p, const Found& piece,
                              double target) {
  const int first = piece.bucket * kPiece;
  if (row.penalised)
    row.count(first / kSliceTokens * kSliceTokens);
  if (warp_index() != 0)
    return -1;
  double mass = piece.mass_before;
  int last = -1;
  for (int start = first; start < min(first + kPiece, row.p.vocabulary); start += 32) {
    const int i = start + lane_index();
    const double value = i < row.p.vocabulary ? row.value(i) : -INFINITY;
    const double probability = row.probability(value);
    const bool kept =
        i < row.p.vocabulary && probability >= min_p && cut.keeps(row.key(value), probability, i);
    const double upto = mass + warp_scan(kept ? probability : 0.0);
    const unsigned over = __ballot_sync(kAllLanes, kept && upto > target);
    if (over != 0)
      return start + __ffs((int)over) - 1;
    const unsigned some = __ballot_sync(kAllLanes, kept);
    last = some != 0 ? start + 31 - __clz((int)some) : last;
    mass = __shfl_sync(kAllLanes, upto, 31);
  }
  return last;
}

// From everything that the cut keeps, in the order of the vocabulary.
template <class T>
__device__ int64_t draw_from_row(const Row<T>& row, CutMemory& memory, const Cut& cut,
                                 const Settings& given) {
  constexpr int kEach = kPieces / kBlockThreads;
  for (int i = (int)threadIdx.x; i < kPieces; i += kBlockThreads)
    memory.pieces[i] = 0.0;
  __syncthreads();
  double mine = 0.0;
  int last = -1;
  row.for_pieces(
      [&](int i, double value) {
        const double probability = row.probability(value);
        if (probability >= given.min_p && cut.keeps(row.key(value), probability, i)) {
          mine += probability;
          last = i;
        }
      },
      [&](int piece) {
        const double sum = warp_sum(mine);
        if (lane_index() == 0)
          memory.pieces[piece] = sum;
        mine = 0.0;
      });
  last = block_max(memory.scratch, last);
  const int first = (int)threadIdx.x * kEach;
  double sum = 0.0;
  for (int i = first; i < first + kEach; ++i)
    sum += memory.pieces[i];
  const Scanned masses = block_scan(memory.scratch, sum);
  const double target = given.u * masses.all;
  Found at{-1, 0, 0, masses.upto - sum, 0.0};
  for (int i = first; i < first + kEach && at.bucket < 0; ++i) {
    if (at.mass_before + memory.pieces[i] > target)
      at.bucket = i;
    else
      at.mass_before += memory.pieces[i];
  }
  const int chosen = first_thread(memory.scratch, at.bucket >= 0);
  if (chosen == kBlockThreads)
    return last;
  if ((int)threadIdx.x == chosen)
    memory.found = at;
  __syncthreads();
  const int token = token_in_piece(row, cut, given.min_p, memory.found, target);
  return token >= 0 ? token : last;
}

// -2 if a draw is needed. Finds the peak on the way.
template <class T> __device__ int64_t without_draw(Row<T>& row, BlockScratch& scratch) {
  Best best{-INFINITY, 0x7fffffff};
  bool broken = false;
  row.for_tokens([&](int i, double value) {
    broken = broken || value != value;
    best = better(best, {value, i});
  });
  const bool any_broken = __syncthreads_or(broken) != 0;
  best = block_best(scratch, best);
  const float temperature = row.p.temperature[row.row];
  if (any_broken || !(fabs(best.value) < INFINITY) || temperature != temperature)
    return -1;
  row.set_peak(best.value);
  return temperature == 0.0f ? best.id : -2;
}

template <class T> __device__ int64_t draw(Row<T>& row, CutMemory& memory) {
  const int64_t token = without_draw(row, memory.scratch);
  if (token != -2)
    return token;
  const Settings given = settings_of(row.p, row.row);
  const Cut all{kKeys, 0.0, 0, false};
  if (!given.limited && !given.shared)
    return draw_from_row(row, memory, all, given);
  const double total = given.limited ? 0.0 : mass_of(row, memory, all, kKeys);
  const Goal goal{given.limited, given.top_k, given.top_p * total};
  const Found bucket = find_first(row, memory, all, goal);
  if (bucket.count_before + bucket.count <= kBlockThreads) {
    const int size = gather(row, memory, all, [&](int key) { return key >> 12 <= bucket.bucket; });
    return draw_from_candidates(memory, given, size, total);
  }
  Cut cut = find_cut(row, memory, all, goal, bucket);
  if (given.limited && given.shared) {
    const Goal share{false, 0, given.top_p * mass_of(row, memory, cut, kKeys)};
    cut = find_cut(row, memory, cut, share, find_first(row, memory, cut, share));
  }
  return draw_from_row(row, memory, cut, given);
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads, 1)
    sample_kernel(const __grid_constant__ SampleCudaParams<T> p) {
  Shared& shared = shared_memory<Shared>();
  Row<T> row(p, shared.counts);
  const int64_t token = draw(row, shared.cut);
  if (threadIdx.x == 0)
    p.tokens[row.row] = token;
}

} // namespace

template <class T> int sample(const SampleCudaParams<T>& p, void* stream) {
  if (p.rows == 0)
    return cudaSuccess;
  if (p.vocabulary > kCudaMostTokens)
    return cudaErrorInvalidValue;
  return launch<sample_kernel<T>>(dim3((unsigned)p.rows), dim3(kBlockThreads), sizeof(Shared), stream, p);
}

template int sample<float>(const SampleCudaParams<float>&, void*);
template int sample<bf16>(const SampleCudaParams<bf16>&, void*);

} // namespace kvkeye::cuda

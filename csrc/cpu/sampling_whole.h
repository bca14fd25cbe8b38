// Draws in which every token may take part, without an array of their probabilities: masses of blocks from
// fp32 probabilities whose error is bounded, and for top-p the tokens near the cut. Where the error could
// change the answer, fp64 decides.
#pragma once

#include "sampling_band.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

constexpr int64_t kUndecided = -2; // the error could change the answer, or the estimate was wrong

// The last token that stays, in the order of rank.
struct Cut {
  double value;
  int64_t id;
  KVKEYE_LAMBDA bool keeps(double p, int64_t i) const { return p > value || (p == value && i <= id); }
};
constexpr Cut kNoCut{0.0, INT64_MAX};

// By how much `before - share * total` may be off, where `before` is a sum of fp32 probabilities and
// contained in `total`, another one.
KVKEYE_INLINE double doubt_of(double before, double share, double total) {
  return kFastError * ((1.0 - share) * before + share * (total - before)) + 0x1p-36 * total;
}

template <class T> struct WholeDraw {
  const Row<T>& row;
  const SampleWorkspace& work;
  int64_t num_penalised; // in work.penalised, with their probabilities
  Softmax softmax;
  FastSoftmax fast;
  double min_p;

  // Working memory, in work.row.
  int64_t num_blocks() const { return blocks_of(row.size, kMassBlock); }
  double* masses() const { return work.row; }                                // [num_blocks]
  float* values() const { return (float*)(work.row + num_blocks()); }        // [2 V + 128]
  uint64_t* near_bits() const { return (uint64_t*)work.candidates; }         // [ceil(V / 64)]
  int32_t* ids() const { return (int32_t*)(values() + 2 * row.size + 128); } // [V / 4 + kMassBlock]

  int64_t end_of(int64_t first, int64_t block) const {
    return first + block < row.size ? first + block : row.size;
  }

  // Tokens [first, end) and the penalised ones among them.
  void load(int64_t first, int64_t end, double* p) const {
    fill_probabilities(row, softmax, first, end, p);
    for (int64_t i = 0; i < num_penalised; ++i)
      if (const Candidate& c = work.penalised[i]; c.id >= first && c.id < end)
        p[c.id - first] = c.value;
  }

  // Calls body(i, four vectors of probabilities of tokens from i on) for the 64 tokens from `first` on. Lanes
  // behind the last token hold next to nothing.
  template <class Body>
  static KVKEYE_LAMBDA void each_of_64(const Row<T>& row, const FastSoftmax& fast, int64_t first, Body body) {
    const bool is_full = first + 64 <= row.size;
    for (int64_t i = first; i < first + 64; i += 4 * kLanes) {
      Vf p[4];
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        const int64_t at = i + part * kLanes, left = row.size - at;
        p[part] = is_full    ? fast.of(row.read(at, kLanes))
                  : left > 0 ? fast.of(row.read(at, left < kLanes ? (int)left : kLanes))
                             : Vf{};
      }
      body(i, p);
    }
  }

  // Logits to probabilities, zeros up to a whole vector.
  void weigh_listed(float* values, int64_t size) const {
    for (int64_t i = 0; i < size; i += kLanes) {
      const int lanes = size - i < kLanes ? (int)(size - i) : kLanes;
      store(values + i, keep(fast.of(kvkeye::KVKEYE_ISA::load(values + i, lanes)), lanes));
    }
  }

  // Where top-p cuts, most likely, judged by the largest logits and by some blocks of the others.
  Band estimate(double top_p) const {
    const float low = next_above(kth_largest(work.peaks, blocks_of(row.size, kScanBlock), kExactBlocks));
    Candidate* c = work.candidates;
    Tokens tokens{values(), values() + 2 * row.size + 128, gather_from(row, work.peaks, low, c), 0};
    for (int64_t i = 0; i < tokens.num_exact; ++i)
      tokens.exact[i] = (float)c[i].value;
    weigh_listed(tokens.exact, tokens.num_exact);
    for (int64_t i = 0; i < num_penalised; ++i)
      tokens.exact[tokens.num_exact++] = (float)work.penalised[i].value;
    pad(tokens);
    const float bound = fast.of(splat(low))[0];
    for (int64_t first = kSampled / 2 * kScanBlock; first < row.size; first += kSampled * kScanBlock) {
      tokens.sampled -= kScanBlock;
      tokens.num_sampled += kScanBlock;
      each_of_64(row, fast, first, [&](int64_t i, const Vf(&p)[4]) KVKEYE_LAMBDA {
        for (int part = 0; part < 4; ++part)
          store(tokens.sampled + (i - first) + part * kLanes, p[part] - add_from(Vf{}, p[part], bound));
      });
    }
    return tokens.band((float)top_p);
  }

  static void pad(const Tokens& tokens) {
    for (int64_t i = tokens.num_exact; i % kLanes != 0; ++i)
      tokens.exact[i] = 0.0f;
  }

  // What is known after a pass over the row.
  struct Masses {
    double total, above; // of all; of what is counted in its block
    int64_t found;       // tokens in the band
  };

  // Counts in its block what reaches the top of the band, or all; marks what lies in the band.
  template <bool kBounded> Masses weigh(const Band& bounds) const {
    const Row<T> row = this->row; // copies, which no store can change
    const FastSoftmax fast = this->fast;
    const Band band = bounds;
    Masses sum{0.0, 0.0, 0};
    for (int64_t block = 0; block < num_blocks(); ++block) {
      Vd all[2] = {}, above[2] = {};
      for (int64_t first = block * kMassBlock; first < end_of(block * kMassBlock, kMassBlock); first += 64) {
        uint64_t near = 0;
        each_of_64(row, fast, first, [&](int64_t i, const Vf(&p)[4]) KVKEYE_LAMBDA {
          add(all, (p[0] + p[1]) + (p[2] + p[3]));
          if (!kBounded)
            return;
#pragma GCC unroll 4
          for (int part = 0; part < 4; ++part) {
            const uint32_t bits = bits_from(p[part], band.low) & ~bits_from(p[part], band.high);
            near |= (uint64_t)bits << (i - first + part * kLanes);
          }
          const Vf left = add_from(add_from(Vf{}, p[0], band.high), p[1], band.high);
          const Vf right = add_from(add_from(Vf{}, p[2], band.high), p[3], band.high);
          add(above, left + right);
        });
        if (kBounded) {
          near_bits()[first / 64] = near;
          sum.found += __builtin_popcountll(near);
        }
      }
      const double mass = sum_of(all[0] + all[1]);
      masses()[block] = kBounded ? sum_of(above[0] + above[1]) : mass;
      sum.total += mass;
      sum.above += masses()[block];
    }
    for (int64_t i = 0; i < num_penalised; ++i) {
      const Candidate& c = work.penalised[i];
      sum.total += c.value;
      if (!kBounded || c.value >= band.high)
        count(c, sum);
    }
    return sum;
  }

  void count(const Candidate& c, Masses& sum) const {
    masses()[c.id / kMassBlock] += c.value;
    sum.above += c.value;
  }

  // The tokens of the band.
  Tokens list(const Band& band, const Masses& sum) const {
    Tokens tokens{values(), nullptr, 0, 0};
    for (int64_t first = 0; first < row.size; first += 64)
      for (uint64_t near = near_bits()[first / 64]; near != 0; near &= near - 1) {
        const int64_t i = first + __builtin_ctzll(near);
        ids()[tokens.num_exact] = (int32_t)i;
        tokens.exact[tokens.num_exact++] = value_of(row.logits[i]);
      }
    weigh_listed(tokens.exact, sum.found);
    for (int64_t i = 0; i < num_penalised; ++i)
      if (const double p = work.penalised[i].value; p >= band.low && p < band.high)
        tokens.exact[tokens.num_exact++] = (float)p;
    pad(tokens);
    return tokens;
  }

  // The part of the band that holds the cut whatever the rounding.
  static Band narrow(const Tokens& tokens, const Band& band, double mass, double doubt) {
    constexpr float margin = 4.0 * kFastError;
    const float sums = 0x1p-17f * tokens.mass_from(0.0f); // in fp32
    const Band cut = tokens.band(band, (float)mass, (float)doubt + sums);
    const float low = cut.low * (1.0f - margin), high = cut.high * (1.0f + margin);
    return {low > band.low ? low : band.low, high < band.high ? high : band.high};
  }

  // Counts the listed tokens that reach `inner`, a part of the band; those in it become candidates. How many.
  int64_t settle(const Band& band, const Band& inner, Masses& sum) const {
    int64_t found = 0, end = 0;
    for (int64_t block = 0; block < num_blocks(); ++block) {
      int64_t i = end;
      for (int64_t first = block * kMassBlock; first < end_of(block * kMassBlock, kMassBlock); first += 64)
        end += __builtin_popcountll(near_bits()[first / 64]);
      Vd kept[2] = {};
      for (; i < end; i += kLanes) {
        const Vf p = kvkeye::KVKEYE_ISA::load(values() + i, end - i < kLanes ? (int)(end - i) : kLanes);
        add(kept, add_from(Vf{}, p, inner.high));
        for (uint32_t in = bits_from(p, inner.low) & ~bits_from(p, inner.high); in != 0; in &= in - 1)
          ids()[found++] = ids()[i + __builtin_ctz(in)];
      }
      const double mass = sum_of(kept[0] + kept[1]);
      masses()[block] += mass;
      sum.above += mass;
    }
    Candidate* c = work.candidates;
    for (int64_t i = 0; i < found; ++i)
      c[i] = {softmax.of(value_of(row.logits[ids()[i]])), ids()[i]};
    for (int64_t i = 0; i < num_penalised; ++i) {
      const Candidate& own = work.penalised[i];
      if (own.value >= inner.high && own.value < band.high)
        count(own, sum);
      else if (own.value >= inner.low && own.value < inner.high)
        c[found++] = own;
    }
    return found;
  }

  // The last of the candidates that stays for certain; adds to `mass` what does. Half of the candidates in
  // question are dismissed at a time.
  static Cut find_cut(Candidate* c, int64_t size, double target, double& mass) {
    while (size > kSmall) {
      const int64_t split = partition<ByRank>(c, size);
      double left = 0.0;
      for (int64_t i = 0; i < split; ++i)
        left += c[i].value;
      if (mass + left < target) {
        mass += left;
        c += split;
        size -= split;
      } else {
        size = split;
      }
    }
    insertion_sort<ByRank>(c, size);
    Cut cut = kNoCut;
    for (int64_t i = 0; i < size && mass < target; ++i) {
      cut = {c[i].value, c[i].id};
      mass += c[i].value;
    }
    return cut;
  }

  // Whether all that is above the band comes before the cut, and all that is below after it.
  static bool lies_in(const Cut& cut, const Band& band) {
    return cut.value * (1.0 + 2.0 * kFastError) < band.high &&
           cut.value >= band.low * (1.0 + 2.0 * kFastError);
  }

  // The first token whose cumulated mass exceeds u times that of all that is counted. Tokens of a mass of up
  // to `slack` may be missing.
  int64_t invert(const Masses& sum, const Cut& cut, double u, double slack) const {
    const double wanted = u * sum.above;
    double mass = 0.0;
    int64_t block = 0;
    for (; block < num_blocks() && mass + masses()[block] <= wanted; ++block)
      mass += masses()[block];
    const double doubt = doubt_of(mass, u, sum.above) + slack;
    const int64_t first = block * kMassBlock, end = end_of(first, kMassBlock);
    double p[kMassBlock];
    load(first, end, p);
    for (int64_t i = first; i < end; ++i) {
      const double own = p[i - first];
      if (!(own >= min_p && cut.keeps(own, i)))
        continue;
      if (mass < wanted - doubt && mass + own > wanted + doubt)
        return i;
      mass += own;
    }
    return slack == 0.0 ? invert_in_full(cut, u) : kUndecided;
  }

  // The same in fp64.
  int64_t invert_in_full(const Cut& cut, double u) const {
    double* p = work.row;
    load(0, row.size, p);
    for (int64_t i = 0; i < row.size; ++i)
      p[i] = cut.keeps(p[i], i) ? p[i] : kDropped;
    return kvkeye::KVKEYE_ISA::invert(p, row.size, min_p, u);
  }

  // Without top-p.
  int64_t draw(double u) const {
    if (!(min_p > 2.0 * kLeast))
      return invert(weigh<false>({}), kNoCut, u, 0.0);
    constexpr double margin = 4.0 * kFastError;
    const Band band{(float)(min_p * (1.0 - margin)), (float)(min_p * (1.0 + margin))};
    Masses sum = weigh<true>(band);
    if (sum.found > row.size / 4)
      return kUndecided;
    list(band, sum);
    const int64_t found = settle(band, band, sum);
    for (int64_t i = 0; i < found; ++i)
      if (work.candidates[i].value >= min_p)
        count(work.candidates[i], sum);
    return invert(sum, kNoCut, u, 0.0);
  }

  int64_t draw(double top_p, double u) const {
    const Band band = estimate(top_p);
    Masses sum = weigh<true>(band);
    if (sum.found > row.size / 4)
      return kUndecided;
    const double target = top_p * sum.total;
    const Band inner =
        narrow(list(band, sum), band, target - sum.above, doubt_of(sum.above, top_p, sum.total));
    const int64_t found = settle(band, inner, sum);
    const double doubt = doubt_of(sum.above, top_p, sum.total);
    Candidate* c = work.candidates;
    double mass = sum.above;
    const Cut cut = find_cut(c, found, target - doubt, mass);
    if (!(sum.above < target - doubt && mass >= target - doubt && lies_in(cut, inner)))
      return kUndecided;
    if (min_p > cut.value) // takes away what top-p does, and more
      return draw(u);
    for (int64_t i = 0; i < found; ++i)
      if (cut.keeps(c[i].value, c[i].id))
        count(c[i], sum);
    // The next in rank may stay, too, and what follows within the doubt.
    return invert(sum, cut, u, mass > target + doubt ? 0.0 : cut.value + 2.0 * doubt);
  }
};

} // namespace
} // namespace kvkeye::KVKEYE_ISA

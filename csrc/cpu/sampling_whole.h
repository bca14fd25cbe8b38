// Draws in which every token may take part, without an array of their probabilities: masses of blocks, and
// for top-p the tokens near the cut.
#pragma once

#include "sampling_mass.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

constexpr int64_t kUndecided = -2; // rounding could change the answer, or the estimate was wrong

// The last token that stays, in the order of rank.
struct Cut {
  double value;
  int64_t id;
  KVKEYE_LAMBDA bool keeps(double p, int64_t i) const { return p > value || (p == value && i <= id); }
};
constexpr Cut kNoCut{0.0, INT64_MAX};

// Probabilities [low, high) in which the cut of top-p is looked for: those above stay, those below go.
struct Band {
  double low, high;
};

// Mass by bucket of probability, estimated from some blocks, and the variance of the estimate.
struct Estimate {
  double mass, variance;
};

constexpr int64_t kExactBlocks = 32; // with the largest peaks, counted whole
constexpr int64_t kSampled = 24;     // one of so many others stands for them

template <class T> struct WholeDraw {
  const Row<T>& row;
  const SampleWorkspace& work;
  int64_t num_penalised;
  Softmax softmax;
  double min_p;

  int64_t num_blocks() const { return blocks_of(row.size, kMassBlock); }
  int64_t end_of(int64_t first, int64_t block) const {
    return first + block < row.size ? first + block : row.size;
  }
  Candidate penalised(int64_t i) const {
    const Candidate& logit = work.penalised[i];
    return {softmax.of(logit.value), logit.id};
  }

  // Tokens [first, end) and the penalised ones among them.
  void load(int64_t first, int64_t end, double* p) const {
    fill_probabilities(row, softmax, first, end, p);
    for (int64_t i = 0; i < num_penalised; ++i)
      if (const Candidate c = penalised(i); c.id >= first && c.id < end)
        p[c.id - first] = c.value;
  }

  // Where top-p cuts, but for four standard deviations.
  Band estimate(double top_p) const {
    Estimate buckets[kBuckets] = {};
    Estimate all{};
    const auto add = [&](double p, double weight) KVKEYE_LAMBDA {
      const Estimate own{weight * p, weight > 1.0 ? weight * weight * p * p : 0.0};
      Estimate& bucket = buckets[bucket_of(p)];
      bucket = {bucket.mass + own.mass, bucket.variance + own.variance};
      all = {all.mass + own.mass, all.variance + own.variance};
    };
    const float least = kth_peak(work.peaks, blocks_of(row.size, kScanBlock), kExactBlocks);
    double p[kScanBlock];
    for (int64_t block = 0; block * kScanBlock < row.size; ++block) {
      const bool exact = work.peaks[block] >= least;
      if (!exact && block % kSampled != kSampled / 2)
        continue;
      const int64_t first = block * kScanBlock, end = end_of(first, kScanBlock);
      fill_probabilities(row, softmax, first, end, p);
      for (int64_t i = 0; i < end - first; ++i)
        add(p[i], exact ? 1.0 : (double)kSampled);
    }
    for (int64_t i = 0; i < num_penalised; ++i)
      add(penalised(i).value, 1.0);
    return band_of(buckets, all, top_p);
  }

  static Band band_of(const Estimate* buckets, const Estimate& all, double top_p) {
    const double target = top_p * all.mass;
    Estimate above{};
    for (int i = 0; i < kBuckets && above.mass < target; ++i)
      above = {above.mass + buckets[i].mass, above.variance + buckets[i].variance};
    // Of the share: what is above the cut enters its numerator and its denominator.
    const double below = all.variance - above.variance;
    const double margin = 4.0 * sqrt((1.0 - top_p) * (1.0 - top_p) * above.variance + top_p * top_p * below);
    Band band{0x1p-1074, INFINITY}; // what has no mass is no candidate
    double mass = 0.0;
    for (int i = 0; i < kBuckets - 1; ++i) {
      mass += buckets[i].mass;
      if (mass < target - margin)
        band.high = floor_of_bucket(i);
      if (mass >= target + margin) {
        band.low = floor_of_bucket(i);
        break;
      }
    }
    return band;
  }

  // Fills the masses of blocks with what reaches `floor`, which is the top of the band if there is one.
  struct Masses {
    double total, above; // of all, and of the blocks
    int64_t found;       // in the band
  };
  template <bool kBounded> Masses weigh(double floor, double low, double* masses, int32_t* ids) const {
    const int64_t most = row.size / 4; // more are no candidates, but a wrong estimate
    Masses sum{0.0, 0.0, 0};
    for (int64_t block = 0; block < num_blocks() && sum.found <= most; ++block) {
      const int64_t first = block * kMassBlock;
      Vd all[2] = {}, above[2] = {};
      for (int64_t part = first; part < end_of(first, kMassBlock); part += 64) {
        uint64_t near = 0;
        for_vectors(part, end_of(part, 64), [&](int64_t i, int lanes) KVKEYE_LAMBDA {
          Vd p[2];
          probabilities(row, softmax, i, lanes, p);
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) {
            const Lanes kept = at_least(p[half], floor);
            above[half] = add_where(kept, above[half], p[half]);
            if (kBounded) {
              all[half] += p[half];
              const uint32_t bits = bits_of(at_least(p[half], low)) & ~bits_of(kept);
              near |= (uint64_t)bits << (i - part + half * kDoubles);
            }
          }
        });
        for (; near != 0; near &= near - 1)
          ids[sum.found++] = (int32_t)part + __builtin_ctzll(near);
      }
      masses[block] = sum_of(above[0] + above[1]);
      sum.above += masses[block];
      sum.total += sum_of(all[0] + all[1]);
    }
    return sum;
  }

  // Tokens by id and the penalised ones that lie in the band -> candidates; how many.
  int64_t weigh_near(const int32_t* ids, int64_t found, const Band& band) const {
    Candidate* c = work.candidates;
    for (int64_t first = 0; first < found; first += kDoubles) {
      const int lanes = found - first < kDoubles ? (int)(found - first) : kDoubles;
      Vd p{};
      for (int lane = 0; lane < lanes; ++lane)
        p[lane] = value_of(row.logits[ids[first + lane]]);
      p = softmax.of(p);
      for (int lane = 0; lane < lanes; ++lane)
        c[first + lane] = {p[lane], ids[first + lane]};
    }
    for (int64_t i = 0; i < num_penalised; ++i)
      if (const Candidate own = penalised(i); own.value >= band.low && own.value < band.high)
        c[found++] = own;
    return found;
  }

  void add_penalised(double floor, double* masses, Masses& sum) const {
    for (int64_t i = 0; i < num_penalised; ++i) {
      const Candidate c = penalised(i);
      sum.total += c.value;
      if (c.value >= floor) {
        masses[c.id / kMassBlock] += c.value;
        sum.above += c.value;
      }
    }
  }

  // Moves the candidates of the part of the band that holds the cut to the front; how many. Adds to `mass`
  // what lies above them.
  static int64_t narrow(Candidate* c, int64_t size, const Band& band, double target, double& mass) {
    constexpr int parts = 256;
    const double scale = parts / (band.high - band.low);
    const auto part_of = [&](double p) KVKEYE_LAMBDA {
      const int part = (int)((p - band.low) * scale);
      return part < parts ? part : parts - 1;
    };
    double masses[parts] = {};
    for (int64_t i = 0; i < size; ++i)
      masses[part_of(c[i].value)] += c[i].value;
    int part = parts - 1;
    for (; part > 0 && mass + masses[part] < target; --part)
      mass += masses[part];
    int64_t front = 0;
    for (int64_t i = 0; i < size; ++i)
      if (part_of(c[i].value) == part)
        exchange(c[i], c[front++]);
    return front;
  }

  // The last of the candidates that stays; false where rounding could change it. Half of the candidates in
  // question are dismissed at a time.
  static bool find_cut(Candidate* c, int64_t size, double mass, double target, double doubt, Cut& cut) {
    while (size > kSmall) {
      const int64_t split = partition<ByRank>(c, size);
      double left = 0.0;
      for (int64_t i = 0; i < split; ++i)
        left += c[i].value;
      if (mass + left < target - doubt) {
        mass += left;
        c += split;
        size -= split;
      } else {
        size = split;
      }
    }
    insertion_sort<ByRank>(c, size);
    for (int64_t i = 0; i < size && mass < target - doubt; ++i) {
      cut = {c[i].value, c[i].id};
      mass += c[i].value;
    }
    return mass > target + doubt;
  }

  // The first token whose cumulated mass exceeds u times the total.
  int64_t invert(const double* masses, const Cut& cut, double u) const {
    double total = 0.0, mass = 0.0;
    int64_t chosen = -1;
    for (int64_t block = 0; block < num_blocks(); ++block)
      total += masses[block];
    for (int64_t block = 0; block < num_blocks(); ++block) {
      if (masses[block] > 0.0)
        chosen = block;
      if (mass + masses[block] > u * total)
        break;
      mass += masses[block];
    }
    if (chosen < 0)
      return -1;
    const int64_t first = chosen * kMassBlock, end = end_of(first, kMassBlock);
    double p[kMassBlock];
    load(first, end, p);
    int64_t last = -1; // where only the order of the sums keeps the mass from being reached
    for (int64_t i = first; i < end; ++i) {
      const double own = p[i - first];
      if (!(own >= min_p && own > 0.0 && cut.keeps(own, i)))
        continue;
      last = i;
      mass += own;
      if (mass > u * total)
        break;
    }
    return last;
  }

  // Without top-p.
  int64_t draw(double u) const {
    double* masses = work.row;
    Masses sum = weigh<false>(min_p, 0.0, masses, nullptr);
    add_penalised(min_p, masses, sum);
    return invert(masses, kNoCut, u);
  }

  int64_t draw(double top_p, double u) const {
    double* masses = work.row;
    int32_t* ids = (int32_t*)(masses + num_blocks());
    const Band band = estimate(top_p);
    Masses sum = weigh<true>(band.high, band.low, masses, ids);
    add_penalised(band.high, masses, sum);
    const double target = top_p * sum.total, doubt = 4.0 * 0x1p-52 * (double)row.size * sum.total;
    if (sum.found > row.size / 4 || !(sum.above < target - doubt))
      return kUndecided;
    if (min_p >= band.high) // top-p takes less away
      return draw(u);
    Cut cut = kNoCut;
    Candidate* c = work.candidates;
    const int64_t found = weigh_near(ids, sum.found, band);
    double mass = sum.above;
    const int64_t size = narrow(c, found, band, target - doubt, mass);
    if (!find_cut(c, size, mass, target, doubt, cut))
      return kUndecided;
    for (int64_t i = 0; i < found; ++i)
      if (c[i].value >= min_p && cut.keeps(c[i].value, c[i].id))
        masses[c[i].id / kMassBlock] += c[i].value;
    return invert(masses, cut, u);
  }
};

} // namespace
} // namespace kvkeye::KVKEYE_ISA

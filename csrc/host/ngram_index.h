// Where the last tokens of a text stood before, and what followed. Twin of kvkeye/_host_ngram_py.py: same
// behaviour and errors.
#pragma once

#include <cstdint>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace kvkeye {

// Tokens, the parent of each (0 is the text's end, i + 1 proposal i), how likely each is by the counts, and
// how many tokens matched. Parents come first, the likeliest branch before the others.
using Proposal = std::tuple<std::vector<int64_t>, std::vector<int64_t>, std::vector<double>, int64_t>;

// Appending a token costs max_length hash entries; proposing looks at max_candidates places. Misuse throws
// std::invalid_argument.
class NgramIndex {
public:
  static constexpr int64_t kSeparator = -1; // ends a text: nothing matches or is proposed across it

  NgramIndex(int64_t min_length, int64_t max_length, int64_t max_candidates);

  int64_t size() const { return static_cast<int64_t>(text_.size()); }
  void append(const std::vector<int64_t>& tokens);
  void keep_last(int64_t count);
  Proposal propose(int64_t num_tokens, int64_t width) const;
  Proposal propose_after(const std::vector<int64_t>& tail, int64_t num_tokens, int64_t width) const;

private:
  struct Places {
    std::unordered_map<uint64_t, int64_t> last; // hash of an n-gram: one past its newest occurrence
    std::vector<int64_t> previous;              // by that end: the one before, or 0
  };
  // A place that matches: one past its end, and how many tokens do.
  struct Candidate {
    int64_t end, length;
  };

  void push(int64_t token);
  int64_t match_length(int64_t end, const std::vector<int64_t>& tail) const;
  std::vector<Candidate> find(const std::vector<int64_t>& tail, int64_t before) const;
  Proposal build(const std::vector<Candidate>& candidates, bool own, int64_t num_tokens, int64_t width) const;

  int64_t min_length_, max_length_, max_candidates_;
  std::vector<int64_t> text_;
  std::vector<Places> places_; // of n-grams of min_length_ + i tokens
};

} // namespace kvkeye

#include "ngram_index.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace kvkeye {

namespace {

constexpr int64_t kMaxMatch = 32;                 // longer matches count as this long
constexpr uint64_t kFactor = 0x9E3779B97F4A7C15u; // odd

void require(bool holds, const std::string& message) {
  if (!holds)
    throw std::invalid_argument("NgramIndex" + message);
}

struct Node {
  int64_t token, depth;
  double weight = 0.0;
  std::vector<size_t> children = {};
};

// What followed each place, as a tree. Node 0 is the end of the text.
class Continuations {
public:
  Continuations() { nodes_.push_back({-1, 0}); }

  size_t child(size_t parent, int64_t token) {
    for (size_t node : nodes_[parent].children)
      if (nodes_[node].token == token)
        return node;
    nodes_[parent].children.push_back(nodes_.size());
    nodes_.push_back({token, nodes_[parent].depth + 1});
    return nodes_.size() - 1;
  }

  Node& operator[](size_t node) { return nodes_[node]; }

  // Heavier first; older nodes, which come from newer places, on ties.
  void rank() {
    auto heavier = [&](size_t a, size_t b) {
      return nodes_[a].weight > nodes_[b].weight || (nodes_[a].weight == nodes_[b].weight && a < b);
    };
    for (Node& node : nodes_)
      std::sort(node.children.begin(), node.children.end(), heavier);
  }

  // The `count` heaviest nodes, at most `width` below one parent.
  std::vector<bool> choose(int64_t count, int64_t width) const {
    std::vector<bool> chosen(nodes_.size(), false);
    std::vector<size_t> open;
    auto expand = [&](size_t node) {
      const auto& children = nodes_[node].children;
      open.insert(open.end(), children.begin(),
                  children.begin() + std::min<int64_t>(width, static_cast<int64_t>(children.size())));
    };
    expand(0);
    for (; count > 0 && !open.empty(); --count) {
      auto best = std::min_element(open.begin(), open.end(), [&](size_t a, size_t b) {
        return nodes_[a].weight > nodes_[b].weight || (nodes_[a].weight == nodes_[b].weight && a < b);
      });
      const size_t node = *best;
      open.erase(best);
      chosen[node] = true;
      expand(node);
    }
    return chosen;
  }

  void write(size_t node, int64_t row, const std::vector<bool>& chosen, double total, Proposal& out) const {
    for (size_t child : nodes_[node].children) {
      if (!chosen[child])
        continue;
      std::get<0>(out).push_back(nodes_[child].token);
      std::get<1>(out).push_back(row);
      std::get<2>(out).push_back(nodes_[child].weight / total);
      write(child, static_cast<int64_t>(std::get<0>(out).size()), chosen, total, out);
    }
  }

private:
  std::vector<Node> nodes_;
};

} // namespace

NgramIndex::NgramIndex(int64_t min_length, int64_t max_length, int64_t max_candidates)
    : min_length_(min_length), max_length_(max_length), max_candidates_(max_candidates) {
  require(1 <= min_length && min_length <= max_length && max_length <= kMaxMatch,
          ": lengths from " + std::to_string(min_length) + " to " + std::to_string(max_length) +
              "; expected 1 <= min_length <= max_length <= " + std::to_string(kMaxMatch));
  require(max_candidates >= 1,
          ": max_candidates is " + std::to_string(max_candidates) + "; expected at least 1");
  places_.resize(static_cast<size_t>(max_length - min_length + 1));
  for (Places& places : places_)
    places.previous.push_back(0);
}

void NgramIndex::append(const std::vector<int64_t>& tokens) {
  for (int64_t token : tokens)
    require(token >= kSeparator, ".append: token " + std::to_string(token) + "; expected at least -1");
  for (int64_t token : tokens)
    push(token);
}

void NgramIndex::push(int64_t token) {
  text_.push_back(token);
  for (Places& places : places_)
    places.previous.push_back(0);
  uint64_t hash = 0;
  for (int64_t n = 1; n <= std::min(max_length_, size()); ++n) {
    const int64_t back = text_[static_cast<size_t>(size() - n)];
    if (back == kSeparator)
      return;
    hash = (hash + static_cast<uint64_t>(back) + 1) * kFactor;
    hash ^= hash >> 29;
    if (n < min_length_)
      continue;
    Places& places = places_[static_cast<size_t>(n - min_length_)];
    int64_t& last = places.last[hash];
    places.previous.back() = last;
    last = size();
  }
}

void NgramIndex::keep_last(int64_t count) {
  require(count >= 0, ".keep_last: count is " + std::to_string(count) + "; expected at least 0");
  const std::vector<int64_t> kept(text_.end() - std::min(count, size()), text_.end());
  *this = NgramIndex(min_length_, max_length_, max_candidates_);
  append(kept);
}

int64_t NgramIndex::match_length(int64_t end, const std::vector<int64_t>& tail) const {
  const int64_t most = std::min({kMaxMatch, end, static_cast<int64_t>(tail.size())});
  int64_t length = 0;
  while (length < most) {
    const int64_t token = text_[static_cast<size_t>(end - 1 - length)];
    if (token == kSeparator || token != tail[tail.size() - 1 - static_cast<size_t>(length)])
      break;
    ++length;
  }
  return length;
}

// The newest places, all ending before `before`, where as many of the last tokens stood as ever did.
std::vector<NgramIndex::Candidate> NgramIndex::find(const std::vector<int64_t>& tail, int64_t before) const {
  std::vector<Candidate> found;
  std::vector<uint64_t> hashes;
  uint64_t hash = 0;
  for (int64_t n = 1; n <= std::min(max_length_, static_cast<int64_t>(tail.size())); ++n) {
    const int64_t back = tail[tail.size() - static_cast<size_t>(n)];
    if (back == kSeparator)
      break;
    hash = (hash + static_cast<uint64_t>(back) + 1) * kFactor;
    hash ^= hash >> 29;
    hashes.push_back(hash);
  }
  for (int64_t n = static_cast<int64_t>(hashes.size()); n >= min_length_ && found.empty(); --n) {
    const Places& places = places_[static_cast<size_t>(n - min_length_)];
    const auto newest = places.last.find(hashes[static_cast<size_t>(n - 1)]);
    int64_t end = newest == places.last.end() ? 0 : newest->second;
    for (; end > 0 && static_cast<int64_t>(found.size()) < max_candidates_;
         end = places.previous[static_cast<size_t>(end)]) {
      if (end >= before || text_[static_cast<size_t>(end)] == kSeparator)
        continue;
      const int64_t length = match_length(end, tail);
      if (length >= n) // else another n-gram of the same hash
        found.push_back({end, length});
    }
  }
  return found;
}

Proposal NgramIndex::build(const std::vector<Candidate>& candidates, bool own, int64_t num_tokens,
                           int64_t width) const {
  Proposal out;
  std::get<3>(out) = 0;
  for (const Candidate& candidate : candidates)
    std::get<3>(out) = std::max(std::get<3>(out), candidate.length);
  Continuations tree;
  double total = 0.0;
  std::vector<int64_t> copied;
  for (const Candidate& candidate : candidates) {
    // A token more of context counts four times as much.
    const double weight = std::ldexp(1.0, static_cast<int>(2 * (candidate.length - std::get<3>(out))));
    total += weight;
    copied.clear();
    size_t node = 0;
    for (int64_t i = 0; i < num_tokens; ++i) {
      const int64_t at = candidate.end + i;
      if (at >= size() && !own)
        break;
      // Behind its own end a text goes on with what has just been copied.
      const int64_t token =
          at < size() ? text_[static_cast<size_t>(at)] : copied[static_cast<size_t>(at - size())];
      if (token == kSeparator)
        break;
      copied.push_back(token);
      node = tree.child(node, token);
      tree[node].weight += weight;
    }
  }
  tree.rank();
  tree.write(0, 0, tree.choose(num_tokens, width), total, out);
  return out;
}

Proposal NgramIndex::propose(int64_t num_tokens, int64_t width) const {
  const std::vector<int64_t> tail(text_.end() - std::min(kMaxMatch, size()), text_.end());
  return build(find(tail, size()), true, num_tokens, width);
}

Proposal NgramIndex::propose_after(const std::vector<int64_t>& tail, int64_t num_tokens,
                                   int64_t width) const {
  return build(find(tail, size()), false, num_tokens, width);
}

} // namespace kvkeye

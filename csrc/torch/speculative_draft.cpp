// The steps of a draft head, made of the ops of a decoder layer without the way back to Python between them.
#include "layers.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace kvkeye {
namespace {

constexpr const char* kOp = "draft_tree";
constexpr int64_t kMaxNodes = 63;
// Logits this far below the best add nothing to a sum of fp32.
constexpr float kNegligible = 20;

// In the order of the argument `weights`.
enum Part {
  kFuse,
  kInputNorm,
  kHiddenNorm,
  kQkv,
  kQNorm,
  kKNorm,
  kOut,
  kPostNorm,
  kGateUp,
  kDown,
  kNorm,
  kHead
};
constexpr size_t kParts = 12;

struct Head {
  const std::vector<Tensor>& weights;
  const Tensor &vocabulary, &k_cache, &v_cache, &block_table;
  const std::vector<int64_t>& sections;
  int64_t num_q_heads, intermediate;
  double theta, eps;

  const Tensor& operator[](Part part) const { return weights[part]; }
  int64_t size() const { return vocabulary.size(1); }
  int64_t dim() const { return k_cache.size(3); }
};

struct Node {
  int64_t token, parent; // parent: a node, or -1
  uint64_t mask;         // of itself and its ancestors
  float score;
};

// A sequence's text and what was proposed after it. Node i stands at place `known` + i of the cache.
struct Tree {
  int64_t known = 0, position = 0; // tokens; rotary position of the last one
  std::vector<Node> nodes;
  std::vector<char> queries;       // of all nodes that were computed
  int64_t previous = 0, first = 0; // first nodes of the last two levels
};

// Rows to compute: bounds by sequence, and the cache that each sequence sees.
struct Batch {
  std::vector<int32_t> bounds{0}, contexts;
  std::vector<int64_t> positions, slots;
};

template <class T> Tensor tensor_of(const Tensor& like, const std::vector<T>& values, ScalarType dtype) {
  const Tensor made = empty(like, {(int64_t)values.size()}, dtype);
  std::copy(values.begin(), values.end(), write<T>(made));
  return made;
}

int64_t row_bytes(const Tensor& table) {
  return table.size(0) == 0 ? 0 : table.numel() / table.size(0) * (int64_t)table.element_size();
}

// Rows of a table: [V, H] and n numbers of rows -> [n, H].
Tensor gather(const Tensor& table, const std::vector<int64_t>& rows) {
  std::vector<int64_t> shape = shape_of(table);
  shape[0] = (int64_t)rows.size();
  const Tensor made = empty(table, shape);
  const int64_t bytes = row_bytes(table);
  for (size_t i = 0; i < rows.size(); ++i)
    std::memcpy(write<char>(made) + (int64_t)i * bytes, read<char>(table) + rows[i] * bytes, bytes);
  return made;
}

// [T, H] twice -> [T, 2 H].
Tensor beside(const Tensor& left, const Tensor& right) {
  const int64_t bytes = row_bytes(left);
  const Tensor made = empty(left, {left.size(0), 2 * left.size(1)});
  for (int64_t i = 0; i < left.size(0); ++i) {
    std::memcpy(write<char>(made) + 2 * i * bytes, read<char>(left) + i * bytes, bytes);
    std::memcpy(write<char>(made) + (2 * i + 1) * bytes, read<char>(right) + i * bytes, bytes);
  }
  return made;
}

int64_t slot_of(const Head& head, int64_t b, int64_t place) {
  const int64_t size = head.k_cache.size(2), width = head.block_table.size(1);
  require(place / size < width, kOp, ": sequence ", b, " needs ", place / size + 1,
          " blocks; block_table has ", width, ".");
  return read<int32_t>(head.block_table)[b * width + place / size] * size + place % size;
}

// The newest rows of a tree see what its branches see: attention over all its nodes, of which the newest
// count.
Tensor attend_trees(const Head& head, const Tensor& q, const Batch& batch, std::vector<Tree>& trees) {
  Batch whole;
  std::vector<int64_t> masks, wanted;
  const int64_t bytes = row_bytes(q);
  for (size_t b = 0; b < trees.size(); ++b) {
    Tree& tree = trees[b];
    const int64_t added = batch.bounds[b + 1] - batch.bounds[b],
                  nodes = added == 0 ? 0 : (int64_t)tree.nodes.size();
    const char* rows = read<char>(q) + batch.bounds[b] * bytes;
    tree.queries.insert(tree.queries.end(), rows, rows + added * bytes);
    for (int64_t i = 0; i < nodes; ++i)
      masks.push_back((int64_t)tree.nodes[i].mask);
    whole.bounds.push_back(whole.bounds.back() + (int32_t)nodes);
    whole.contexts.push_back((int32_t)(tree.known + nodes));
    for (int64_t i = nodes - added; i < nodes; ++i)
      wanted.push_back(whole.bounds[b] + i);
  }
  const Tensor queries = empty(q, {(int64_t)masks.size(), q.size(1), q.size(2)});
  for (size_t b = 0; b < trees.size(); ++b)
    if (whole.bounds[b + 1] > whole.bounds[b])
      std::memcpy(write<char>(queries) + whole.bounds[b] * bytes, trees[b].queries.data(),
                  trees[b].queries.size());
  const Tensor attended =
      std::get<0>(paged_attention(queries, head.k_cache, head.v_cache, head.block_table,
                                  tensor_of(head.block_table, whole.bounds, ScalarType::Int),
                                  tensor_of(head.block_table, whole.contexts, ScalarType::Int),
                                  tensor_of(q, masks, ScalarType::Long), 1 / std::sqrt((double)head.dim())));
  return gather(attended, wanted);
}

Tensor attend(const Head& head, const Tensor& q, const Batch& batch) {
  return std::get<0>(paged_attention(q, head.k_cache, head.v_cache, head.block_table,
                                     tensor_of(head.block_table, batch.bounds, ScalarType::Int),
                                     tensor_of(head.block_table, batch.contexts, ScalarType::Int),
                                     std::nullopt, 1 / std::sqrt((double)head.dim())));
}

// The decoder layer over new rows: hidden, embeds [T, H] -> [T, H]. `trees` where branches part.
Tensor layer(const Head& head, const Tensor& hidden, const Tensor& embeds, const Batch& batch,
             std::vector<Tree>* trees) {
  const int64_t rows = hidden.size(0), dim = head.dim();
  const Tensor x =
      beside(rms_norm(embeds, head[kInputNorm], head.eps), rms_norm(hidden, head[kHiddenNorm], head.eps));
  const Tensor qkv =
      prepacked_linear(x, head[kQkv], std::nullopt, (head.num_q_heads + 2 * head.k_cache.size(1)) * dim);
  std::vector<int64_t> axes;
  for (int axis = 0; axis < 3; ++axis)
    axes.insert(axes.end(), batch.positions.begin(), batch.positions.end());
  const Tensor positions = empty(x, {3, rows}, ScalarType::Long);
  std::copy(axes.begin(), axes.end(), write<int64_t>(positions));
  const Tensor q =
      qk_norm_mrope_append(qkv, head[kQNorm], head[kKNorm], positions, head.k_cache, head.v_cache,
                           tensor_of(x, batch.slots, ScalarType::Long), head.sections, head.theta, head.eps);
  const Tensor o = trees == nullptr ? attend(head, q, batch) : attend_trees(head, q, batch, *trees);
  const Tensor flat = torch::stable::view(o, {rows, head.num_q_heads * dim});
  const Tensor attended = prepacked_linear(flat, head[kOut], std::nullopt, head.size());
  const auto [normed, total] = add_rms_norm(attended, hidden, head[kPostNorm], head.eps);
  const Tensor inner = prepacked_linear_silu_mul(normed, head[kGateUp], head.intermediate);
  return prepacked_linear_add(inner, head[kDown], std::nullopt, total);
}

float widened(float value) {
  return value;
}

float widened(bf16 value) {
  const uint32_t bits = (uint32_t)value.bits << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

struct Choice {
  int64_t token;
  float chance;
};

// The `width` likeliest tokens of a row, the likeliest first, of equal ones the first; none where it holds
// NaN.
template <class T> void likeliest(const T* logits, int64_t size, int64_t width, std::vector<Choice>& found) {
  found.clear();
  for (int64_t token = 0; token < size; ++token) {
    const float value = widened(logits[token]);
    if ((int64_t)found.size() == width && !(value > found.back().chance))
      continue;
    auto place = found.begin();
    while (place != found.end() && !(value > place->chance))
      ++place;
    found.insert(place, {token, value});
    if ((int64_t)found.size() > width)
      found.pop_back();
  }
  const float best = found[0].chance;
  float sum = 0;
  for (int64_t token = 0; token < size; ++token) {
    const float below = widened(logits[token]) - best;
    if (!(below < -kNegligible)) // NaN comes along
      sum += std::exp(below);
  }
  for (Choice& choice : found)
    choice.chance = std::exp(choice.chance - best) / sum;
}

// Adds the best children of the newest level that are likely enough; whether there are any in some tree.
bool grow(std::vector<Tree>& trees, const Batch& batch, const Tensor& logits, int64_t level, int64_t width,
          float min_score) {
  bool any = false;
  std::vector<Choice> choices;
  for (size_t b = 0; b < trees.size(); ++b) {
    Tree& tree = trees[b];
    std::vector<Node> children;
    const int64_t rows = level == 0 ? 1 : batch.bounds[b + 1] - batch.bounds[b];
    const int64_t first_row = level == 0 ? (int64_t)b : batch.bounds[b];
    for (int64_t row = 0; row < rows; ++row) {
      with_type({kOp, "features", logits}, [&](auto type) {
        using T = decltype(type);
        likeliest(read<T>(logits) + (first_row + row) * logits.size(1), logits.size(1), width, choices);
      });
      const int64_t parent = level == 0 ? -1 : tree.first + row;
      for (const Choice& choice : choices) {
        const float score = choice.chance * (parent < 0 ? 1 : tree.nodes[parent].score);
        if (score >= min_score) // which NaN is not
          children.push_back({choice.token, parent, parent < 0 ? 0 : tree.nodes[parent].mask, score});
      }
    }
    std::stable_sort(children.begin(), children.end(),
                     [](const Node& a, const Node& c) { return a.score > c.score; });
    children.resize(std::min<size_t>(children.size(), width));
    tree.previous = tree.first;
    tree.first = (int64_t)tree.nodes.size();
    for (Node& child : children) {
      child.mask |= (uint64_t)1 << tree.nodes.size();
      tree.nodes.push_back(child);
    }
    any = any || !children.empty();
  }
  return any;
}

// The newest level as rows; `parents` are the rows of the level before that they continue.
Batch next_rows(const Head& head, const std::vector<Tree>& trees, const Batch& before, int64_t level,
                std::vector<int64_t>& parents, std::vector<int64_t>& tokens) {
  Batch batch;
  for (size_t b = 0; b < trees.size(); ++b) {
    const Tree& tree = trees[b];
    const int64_t count = (int64_t)tree.nodes.size();
    for (int64_t i = tree.first; i < count; ++i) {
      const Node& node = tree.nodes[i];
      parents.push_back(level == 0 ? (int64_t)b : before.bounds[b] + node.parent - tree.previous);
      tokens.push_back(node.token);
      batch.positions.push_back(tree.position + level + 1);
      batch.slots.push_back(slot_of(head, (int64_t)b, tree.known + i));
    }
    batch.bounds.push_back((int32_t)batch.slots.size());
    batch.contexts.push_back((int32_t)(tree.known + count));
  }
  return batch;
}

void check(const Head& head, const Tensor& features, const Tensor& embeds, const Tensor& cu_seqlens,
           const Tensor& context_lens, const Tensor& positions, int64_t depth, int64_t width) {
  require(head.weights.size() == kParts, kOp, ": ", head.weights.size(), " weights; expected ", kParts, ".");
  const Argument vocabulary{kOp, "vocabulary", head.vocabulary}, table{kOp, "block_table", head.block_table};
  vocabulary.has_dim(2, "[Vd, H]");
  vocabulary.has_dtype(features.scalar_type());
  Argument{kOp, "features", features}.has_dim(2, "[T, 3 H]");
  Argument{kOp, "features", features}.has_shape({features.size(0), 3 * head.size()});
  Argument{kOp, "embeds", embeds}.has_shape({features.size(0), head.size()});
  Argument{kOp, "embeds", embeds}.has_dtype(features.scalar_type());
  Argument{kOp, "cu_seqlens", cu_seqlens}.has_dim(1, "[B + 1]");
  Argument{kOp, "cu_seqlens", cu_seqlens}.has_dtype(ScalarType::Int);
  const int64_t sequences = cu_seqlens.size(0) - 1;
  Argument{kOp, "context_lens", context_lens}.has_shape({sequences});
  Argument{kOp, "context_lens", context_lens}.has_dtype(ScalarType::Int);
  Argument{kOp, "positions", positions}.has_shape({features.size(0)});
  Argument{kOp, "positions", positions}.has_dtype(ScalarType::Long);
  table.has_dim(2, "[B, M]");
  table.has_shape({sequences, head.block_table.size(1)});
  table.has_dtype(ScalarType::Int);
  require(head.vocabulary.size(0) > 0 && depth >= 1 && width >= 1 && depth * width <= kMaxNodes, kOp,
          ": depth is ", depth, " and width ", width, "; expected at least 1 each and a product of at most ",
          kMaxNodes, ".");
}

// The rows that the head has not seen yet, each the newest of its sequence up to the last known token.
Batch known_rows(const Head& head, const Tensor& cu_seqlens, const Tensor& context_lens,
                 const Tensor& positions, std::vector<Tree>& trees, std::vector<int64_t>& last) {
  const int32_t *bounds = read<int32_t>(cu_seqlens), *contexts = read<int32_t>(context_lens);
  const int64_t rows = positions.size(0);
  Batch batch;
  batch.positions.assign(read<int64_t>(positions), read<int64_t>(positions) + rows);
  for (size_t b = 0; b < trees.size(); ++b) {
    const int64_t count = bounds[b + 1] - bounds[b];
    require(bounds[b] == batch.bounds.back() && count >= 1 && bounds[b + 1] <= rows && count <= contexts[b],
            kOp, ": sequence ", b, " has rows ", bounds[b], " to ", bounds[b + 1], " and ", contexts[b],
            " tokens; expected at least one row, rows in order and no more of them than tokens.");
    for (int64_t i = 0; i < count; ++i)
      batch.slots.push_back(slot_of(head, (int64_t)b, contexts[b] - count + i));
    batch.bounds.push_back(bounds[b + 1]);
    batch.contexts.push_back(contexts[b]);
    trees[b].known = contexts[b];
    trees[b].position = batch.positions[bounds[b + 1] - 1];
    last.push_back(bounds[b + 1] - 1);
  }
  require(batch.bounds.back() == rows, kOp, ": cu_seqlens ends at ", batch.bounds.back(), "; expected ", rows,
          ".");
  return batch;
}

std::tuple<Tensor, Tensor, Tensor>
draft_tree(const Tensor& features, const Tensor& embeds, const Tensor& vocabulary,
           const std::vector<Tensor>& weights, const Tensor& k_cache, const Tensor& v_cache,
           const Tensor& block_table, const Tensor& cu_seqlens, const Tensor& context_lens,
           const Tensor& positions, const std::vector<int64_t>& sections, int64_t num_q_heads,
           int64_t intermediate, double theta, double eps, int64_t depth, int64_t width, double min_score) {
  const Tensor table = dense(block_table), rows = dense(vocabulary), places = dense(positions);
  const Head head{weights, rows, k_cache, v_cache, table, sections, num_q_heads, intermediate, theta, eps};
  check(head, features, embeds, cu_seqlens, context_lens, positions, depth, width);
  const int64_t sequences = context_lens.size(0), nodes = depth * width;
  std::vector<Tree> trees(sequences);
  std::vector<int64_t> last;
  Batch batch = known_rows(head, dense(cu_seqlens), dense(context_lens), places, trees, last);
  if (sequences > 0) {
    const Tensor hidden = prepacked_linear(features, head[kFuse], std::nullopt, head.size());
    Tensor states = gather(layer(head, hidden, dense(embeds), batch, nullptr), last);
    for (int64_t level = 0;; ++level) {
      const Tensor logits =
          prepacked_linear(rms_norm(states, head[kNorm], eps), head[kHead], std::nullopt, rows.size(0));
      if (!grow(trees, batch, logits, level, width, (float)min_score) || level + 1 == depth)
        break;
      std::vector<int64_t> parents, tokens;
      batch = next_rows(head, trees, batch, level, parents, tokens);
      states =
          layer(head, gather(states, parents), gather(rows, tokens), batch, width > 1 ? &trees : nullptr);
    }
  }
  const Tensor found = empty(places, {sequences, nodes}), parents = empty(places, {sequences, nodes}),
               scores = empty(places, {sequences, nodes}, ScalarType::Float);
  for (int64_t i = 0; i < sequences * nodes; ++i) {
    const std::vector<Node>& own = trees[i / nodes].nodes;
    const bool there = i % nodes < (int64_t)own.size();
    write<int64_t>(found)[i] = there ? own[i % nodes].token : -1;
    write<int64_t>(parents)[i] = there ? own[i % nodes].parent : -1;
    write<float>(scores)[i] = there ? own[i % nodes].score : 0;
  }
  return {found, parents, scores};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cpu, CPU, m) {
  m.impl("draft_tree", TORCH_BOX(&draft_tree));
}

} // namespace kvkeye

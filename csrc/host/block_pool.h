// Reference-counted KV blocks with an index by content. Twin of kvkeye/_host_py.py: same behaviour, errors
// and order.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace kvkeye {

// A block is in exactly one place: free; used (ref_count > 0); or cached (ref_count 0, content kept under a
// key). allocate() takes free blocks first, last released first, then evicts cached ones, least recently used
// first. Misuse throws std::invalid_argument, a block out of range std::out_of_range, exhaustion
// std::runtime_error.
class BlockPool {
public:
  explicit BlockPool(int64_t num_blocks);

  int64_t num_blocks() const { return static_cast<int64_t>(blocks_.size()); }
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }
  int64_t num_cached() const { return num_cached_; }
  int64_t num_available() const { return num_free() + num_cached_; }
  int64_t num_used() const { return num_blocks() - num_available(); }
  int64_t ref_count(int64_t block) const { return checked(block).ref_count; }
  const std::optional<std::string>& key_of(int64_t block) const { return checked(block).key; }

  std::vector<int64_t> allocate(int64_t count);
  void retain(int64_t block);
  void release(int64_t block);
  bool publish(int64_t block, const std::string& key);
  std::vector<int64_t> match(const std::vector<std::string>& keys);
  int64_t evict(int64_t count);
  void clear();
  void check() const;

private:
  static constexpr int64_t kNone = -1;

  struct Block {
    int64_t ref_count = 0;
    int64_t older = kNone; // neighbours in the list of cached blocks
    int64_t newer = kNone;
    bool is_cached = false;
    std::optional<std::string> key;
  };

  const Block& checked(int64_t block) const;
  Block& checked(int64_t block) { return const_cast<Block&>(std::as_const(*this).checked(block)); }
  void push_newest(int64_t block);
  void unlink(int64_t block);
  void forget(int64_t block);

  std::vector<Block> blocks_;
  std::vector<int64_t> free_;
  std::unordered_map<std::string, int64_t> index_;
  int64_t oldest_ = kNone;
  int64_t newest_ = kNone;
  int64_t num_cached_ = 0;
};

} // namespace kvkeye

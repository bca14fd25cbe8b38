#include "block_pool.h"

#include <stdexcept>

namespace kvkeye {

namespace {

std::string text(const char* before, int64_t number, const char* after) {
  return std::string("BlockPool") + before + std::to_string(number) + after;
}

} // namespace

BlockPool::BlockPool(int64_t num_blocks) {
  if (num_blocks < 1)
    throw std::invalid_argument(text(": num_blocks is ", num_blocks, "; expected at least 1"));
  blocks_.resize(static_cast<size_t>(num_blocks));
  free_.reserve(static_cast<size_t>(num_blocks));
  for (int64_t block = num_blocks - 1; block >= 0; --block)
    free_.push_back(block);
}

const BlockPool::Block& BlockPool::checked(int64_t block) const {
  if (block < 0 || block >= num_blocks())
    throw std::out_of_range(text(": block ", block, " is outside [0, ") + std::to_string(num_blocks()) + ")");
  return blocks_[static_cast<size_t>(block)];
}

void BlockPool::push_newest(int64_t block) {
  Block& entry = checked(block);
  entry.is_cached = true;
  entry.older = newest_;
  entry.newer = kNone;
  (newest_ == kNone ? oldest_ : checked(newest_).newer) = block;
  newest_ = block;
  ++num_cached_;
}

void BlockPool::unlink(int64_t block) {
  Block& entry = checked(block);
  (entry.older == kNone ? oldest_ : checked(entry.older).newer) = entry.newer;
  (entry.newer == kNone ? newest_ : checked(entry.newer).older) = entry.older;
  entry.is_cached = false;
  --num_cached_;
}

void BlockPool::forget(int64_t block) {
  Block& entry = checked(block);
  if (!entry.key)
    return;
  index_.erase(*entry.key);
  entry.key.reset();
}

std::vector<int64_t> BlockPool::allocate(int64_t count) {
  if (count < 0)
    throw std::invalid_argument(text(".allocate: count is ", count, "; expected at least 0"));
  if (count > num_available())
    throw std::runtime_error(text(".allocate: asked for ", count, " blocks; ") +
                             std::to_string(num_available()) + " are available");
  if (count > num_free())
    evict(count - num_free());
  std::vector<int64_t> blocks(free_.rbegin(), free_.rbegin() + count);
  free_.resize(free_.size() - static_cast<size_t>(count));
  for (int64_t block : blocks)
    checked(block).ref_count = 1;
  return blocks;
}

void BlockPool::retain(int64_t block) {
  Block& entry = checked(block);
  if (entry.ref_count == 0) {
    if (!entry.is_cached)
      throw std::invalid_argument(text(".retain: block ", block, " is free"));
    unlink(block);
  }
  ++entry.ref_count;
}

void BlockPool::release(int64_t block) {
  Block& entry = checked(block);
  if (entry.ref_count == 0)
    throw std::invalid_argument(text(".release: block ", block, " has no owner"));
  if (--entry.ref_count > 0)
    return;
  if (entry.key)
    push_newest(block);
  else
    free_.push_back(block);
}

bool BlockPool::publish(int64_t block, const std::string& key) {
  Block& entry = checked(block);
  if (entry.ref_count == 0)
    throw std::invalid_argument(text(".publish: block ", block, " has no owner"));
  if (entry.key || !index_.emplace(key, block).second)
    return false;
  entry.key = key;
  return true;
}

std::vector<int64_t> BlockPool::match(const std::vector<std::string>& keys) {
  std::vector<int64_t> blocks;
  for (const std::string& key : keys) {
    auto found = index_.find(key);
    if (found == index_.end())
      break;
    retain(found->second);
    blocks.push_back(found->second);
  }
  return blocks;
}

int64_t BlockPool::evict(int64_t count) {
  int64_t evicted = 0;
  for (; evicted < count && oldest_ != kNone; ++evicted) {
    int64_t block = oldest_;
    unlink(block);
    forget(block);
    free_.push_back(block);
  }
  return evicted;
}

void BlockPool::clear() {
  evict(num_blocks());
  for (int64_t block = 0; block < num_blocks(); ++block)
    forget(block);
}

void BlockPool::check() const {
  auto require = [](bool holds, const std::string& message) {
    if (!holds)
      throw std::runtime_error(message);
  };
  std::vector<int> places(blocks_.size(), 0);
  for (int64_t block : free_) {
    ++places[static_cast<size_t>(block)];
    require(!checked(block).key, text(": free block ", block, " has a key"));
  }
  int64_t num_linked = 0;
  for (int64_t block = oldest_; block != kNone; block = checked(block).newer) {
    ++places[static_cast<size_t>(block)];
    require(checked(block).key.has_value(), text(": cached block ", block, " has no key"));
    require(++num_linked <= num_cached_, "BlockPool: the list of cached blocks is longer than its count");
  }
  require(num_linked == num_cached_, "BlockPool: the list of cached blocks is shorter than its count");
  size_t num_keys = 0;
  for (int64_t block = 0; block < num_blocks(); ++block) {
    const Block& entry = checked(block);
    int where = places[static_cast<size_t>(block)] + (entry.ref_count > 0);
    require(where == 1, text(": block ", block, " is in ") + std::to_string(where) + " places");
    if (!entry.key)
      continue;
    ++num_keys;
    auto found = index_.find(*entry.key);
    require(found != index_.end() && found->second == block,
            text(": the index does not lead to block ", block, ""));
  }
  require(num_keys == index_.size(), "BlockPool: the index has " + std::to_string(index_.size()) +
                                         " keys; blocks have " + std::to_string(num_keys));
}

} // namespace kvkeye

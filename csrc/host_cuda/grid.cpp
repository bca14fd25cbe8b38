#include "grid.h"

#include "fiber.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace kvkeye::host_cuda {

Place place;

namespace {

constexpr unsigned kWarp = 32;
constexpr unsigned kMostResident = 3;
constexpr int kPoison = 0xff; // a NaN in every floating type, -1 in every integer

enum class State { ready, in_barrier, in_warp, returned };

struct Copy {
  void* target;
  const void* source;
  char bytes[16]; // what was there when it started
  unsigned group;
};

// A block that runs.
struct Block {
  unsigned index = 0; // in the grid
  unsigned first = 0; // its threads, in Grid::threads
  unsigned epoch = 0, arrived = 0, returned = 0;
  std::unique_ptr<char[]> shared; // of the exact size: AddressSanitizer guards its end
};

struct Thread {
  explicit Thread(void (*body)()) : fiber(body) {}

  Fiber fiber;
  Block* block = nullptr;
  dim3 index;
  State state = State::ready;
  // What it waits for, and what it brought.
  const char* what = nullptr;
  Line line{};
  unsigned mask = 0;
  uint64_t value = 0;
  // What it was given.
  int sum = 0;
  uint64_t lanes[kWarp];
  // Asynchronous copies on their way, and groups of them committed.
  std::vector<Copy> copies;
  unsigned groups = 0;
  // For the race checker.
  unsigned clock = 0, knows[kWarp];
  Order order;
};

struct Grid {
  Fiber scheduler;
  std::deque<Thread> threads; // kept from launch to launch: a stack is made once
  std::vector<unsigned> ready;
  std::mt19937_64 random;
  uint64_t seed = 0;

  const Launch* launch = nullptr;
  unsigned size = 0; // threads of a block
  std::vector<Block> resident;
  std::vector<unsigned> waiting; // blocks that no thread has begun
  unsigned running = 0;
  bool prints = false;
};

Grid grid;

std::string text(const dim3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) +
         ")";
}

std::string text(const Line& line) {
  const char* slash = std::strrchr(line.file, '/');
  return std::string(slash != nullptr ? slash + 1 : line.file) + ":" + std::to_string(line.line);
}

// "int launch(...) [with auto Kernel = name<T>; Args = ...]"
std::string kernel_name() {
  const std::string signature = grid.launch->signature, key = "Kernel = ";
  const size_t start = signature.find(key);
  if (start == std::string::npos)
    return signature;
  return signature.substr(start + key.size(), signature.find_first_of(";]", start) - start - key.size());
}

dim3 unravel(uint64_t i, const dim3& size) {
  return {unsigned(i % size.x), unsigned(i / size.x % size.y), unsigned(i / size.x / size.y)};
}

unsigned random_below(size_t bound) {
  return unsigned(grid.random() % bound);
}

Thread& current() {
  return grid.threads[grid.running];
}

void wait_as(State state) {
  current().state = state;
  Fiber::change(current().fiber, grid.scheduler);
}

void wake(unsigned thread) {
  grid.threads[thread].state = State::ready;
  grid.ready.push_back(thread);
}

void thread_main() {
  for (;;) { // once per block
    grid.launch->kernel();
    wait_as(State::returned);
  }
}

std::string standing(const Thread& thread) {
  switch (thread.state) {
  case State::in_barrier:
    return std::string("waits for ") + thread.what + " at " + text(thread.line);
  case State::in_warp: {
    char mask[16];
    std::snprintf(mask, sizeof mask, "0x%08x", thread.mask);
    return std::string("waits for ") + thread.what + " of lanes " + mask + " at " + text(thread.line);
  }
  case State::returned:
    return "has returned";
  default:
    return "runs";
  }
}

// Threads that stand alike, in one line each: how many, the first one, where.
[[noreturn]] void stuck(const Block& block, const char* why) {
  struct Group {
    std::string where;
    unsigned first, count;
  };
  std::vector<Group> groups;
  for (unsigned i = block.first; i < block.first + grid.size; ++i) {
    const std::string where = standing(grid.threads[i]);
    const auto same = [&](const Group& group) { return group.where == where; };
    const auto found = std::find_if(groups.begin(), groups.end(), same);
    if (found == groups.end())
      groups.push_back({where, i, 1});
    else
      ++found->count;
  }
  std::string list;
  for (const Group& group : groups)
    list += "\n  thread " + text(grid.threads[group.first].index) + " " + group.where +
            (group.count > 1 ? ", so do " + std::to_string(group.count - 1) + " more" : "");
  grid.running = block.first; // the fault names the block
  fault("%s%s", why, list.c_str());
}

// Whether all lanes of the mask wait for the same as `self`. `first` is the warp's first thread.
bool all_arrived(unsigned first, const Thread& self) {
  for (unsigned i = 0; i < kWarp; ++i) {
    if ((self.mask >> i & 1) == 0)
      continue;
    if (first + i >= self.block->first + grid.size)
      return false;
    const Thread& other = grid.threads[first + i];
    if (other.state != State::in_warp || other.mask != self.mask || std::strcmp(other.what, self.what) != 0)
      return false;
  }
  return true;
}

// Gives every lane of the mask all values, and after __syncwarp the sight of what the others did before.
void hand_out(unsigned first, const Thread& self) {
  const unsigned mask = self.mask;
  const bool orders_memory = std::strcmp(self.what, "__syncwarp") == 0;
  uint64_t values[kWarp] = {};
  unsigned knows[kWarp] = {};
  std::vector<const Release*> seen;
  for (unsigned i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) == 0)
      continue;
    Thread& other = grid.threads[first + i];
    values[i] = other.value;
    if (orders_memory) {
      other.knows[i] = ++other.clock;
      merge(seen, other.order);
    }
    for (unsigned j = 0; j < kWarp; ++j)
      knows[j] = std::max(knows[j], other.knows[j]);
  }
  for (unsigned i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) == 0)
      continue;
    Thread& other = grid.threads[first + i];
    std::memcpy(other.lanes, values, sizeof values);
    if (orders_memory) {
      std::memcpy(other.knows, knows, sizeof knows);
      other.order.acquired = seen;
    }
    wake(first + i);
  }
}

void begin(Block& block) {
  block.index = grid.waiting.back();
  grid.waiting.pop_back();
  block.epoch = block.arrived = block.returned = 0;
  std::memset(block.shared.get(), kPoison, grid.launch->shared);
  for (unsigned i = 0; i < grid.size; ++i) {
    Thread& thread = grid.threads[block.first + i];
    thread.block = &block;
    thread.index = unravel(i, grid.launch->block);
    thread.copies.clear();
    thread.groups = thread.clock = 0;
    std::memset(thread.knows, 0, sizeof thread.knows);
    thread.order = {};
    wake(block.first + i);
  }
}

// A thread drawn from those that can go on, up to its next wait.
void step() {
  unsigned& picked = grid.ready[random_below(grid.ready.size())];
  grid.running = picked;
  picked = grid.ready.back();
  grid.ready.pop_back();
  Thread& thread = current();
  place = {grid.launch->grid, grid.launch->block, unravel(thread.block->index, grid.launch->grid),
           thread.index};
  Fiber::change(grid.scheduler, thread.fiber);
  if (thread.state == State::returned && ++thread.block->returned == grid.size && !grid.waiting.empty())
    begin(*thread.block);
}

// One to three blocks at a time, in shuffled order.
void run_blocks() {
  const unsigned count = grid.launch->grid.x * grid.launch->grid.y * grid.launch->grid.z;
  grid.waiting.resize(count);
  for (unsigned i = 0; i < count; ++i)
    grid.waiting[i] = i;
  std::shuffle(grid.waiting.begin(), grid.waiting.end(), grid.random);
  grid.resident = std::vector<Block>(std::min(count, 1 + random_below(kMostResident)));
  while (grid.threads.size() < grid.resident.size() * grid.size)
    grid.threads.emplace_back(&thread_main);
  grid.ready.clear();
  for (unsigned i = 0; i < grid.resident.size(); ++i) {
    Block& block = grid.resident[i];
    block.first = i * grid.size;
    block.shared.reset(new char[grid.launch->shared]);
    watch("shared memory", block.shared.get(), grid.launch->shared);
    begin(block);
  }
  while (!grid.ready.empty())
    step();
  for (const Block& block : grid.resident) {
    if (block.returned < grid.size)
      stuck(block, "deadlock, no thread can go on");
    forget(block.shared.get());
  }
}

bool fits(const Launch& launch) {
  const auto empty = [](const dim3& size) { return size.x == 0 || size.y == 0 || size.z == 0; };
  return !empty(launch.grid) && !empty(launch.block) && launch.grid.x <= 0x7fffffffu &&
         launch.grid.y <= 65535 && launch.grid.z <= 65535 &&
         (uint64_t)launch.block.x * launch.block.y * launch.block.z <= 1024 && launch.block.z <= 64 &&
         launch.shared <= kSharedLimit;
}

} // namespace

void fault(const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::vector<char> what(8192);
  std::vsnprintf(what.data(), what.size(), format, values);
  va_end(values);
  std::fprintf(stderr, "host_cuda: kernel %s, block %s, seed %llu: %s\n", kernel_name().c_str(),
               text(unravel(current().block->index, grid.launch->grid)).c_str(),
               (unsigned long long)grid.seed, what.data());
  std::fflush(nullptr);
  std::_Exit(kFault);
}

void trap(Line here) {
  fault("thread %s reached __trap at %s", text(current().index).c_str(), text(here).c_str());
}

void print_launches() {
  grid.prints = true;
}

void shuffle_by(uint64_t seed) {
  grid.seed = seed;
  grid.random.seed(seed);
}

int run(const Launch& launch) {
  if (!fits(launch))
    return 9; // cudaErrorInvalidConfiguration
  grid.launch = &launch;
  grid.size = launch.block.x * launch.block.y * launch.block.z;
  if (grid.prints) {
    std::printf("%u %zu %s\n", grid.size, launch.shared, kernel_name().c_str());
    grid.launch = nullptr;
    return 0;
  }
  forget_accesses();
  forget_order();
  run_blocks();
  grid.launch = nullptr;
  return 0;
}

bool left_out(const char* place) {
  static const char* const named = std::getenv("KVKEYE_WITHOUT");
  return named != nullptr && std::strcmp(named, place) == 0;
}

void* shared_memory(size_t bytes) {
  if (bytes > grid.launch->shared)
    fault("a struct of %zu bytes in shared memory; the launch gave %zu", bytes, grid.launch->shared);
  return current().block->shared.get();
}

int lane() {
  return int((grid.running - current().block->first) % kWarp);
}

int barrier(const char* what, int value, Line here) {
  Thread& self = current();
  self.what = what;
  self.line = here;
  self.value = (uint64_t)value;
  Block& block = *self.block;
  if (++block.arrived < grid.size) {
    wait_as(State::in_barrier);
    return self.sum;
  }
  self.state = State::in_barrier;
  int sum = 0;
  std::vector<const Release*> seen;
  for (unsigned i = block.first; i < block.first + grid.size; ++i) {
    const Thread& other = grid.threads[i];
    if (other.line.line != here.line || std::strcmp(other.what, what) != 0)
      stuck(block, "the threads wait at different barriers");
    sum += (int)other.value;
    merge(seen, other.order);
  }
  block.arrived = 0;
  const bool orders_memory = !left_out(text(here).c_str());
  block.epoch += orders_memory;
  for (unsigned i = block.first; i < block.first + grid.size; ++i) {
    grid.threads[i].sum = sum;
    if (orders_memory)
      grid.threads[i].order.acquired = seen;
    wake(i);
  }
  wait_as(State::ready);
  return self.sum;
}

const uint64_t* exchange(const char* what, unsigned mask, uint64_t value, Line here) {
  Thread& self = current();
  const unsigned first = grid.running - (unsigned)lane();
  if ((mask >> lane() & 1) == 0)
    fault("thread %s calls %s at %s with lanes 0x%08x, which leave it out", text(self.index).c_str(), what,
          text(here).c_str(), mask);
  self.what = what;
  self.line = here;
  self.mask = mask;
  self.value = value;
  self.state = State::in_warp;
  if (!all_arrived(first, self)) {
    wait_as(State::in_warp);
    return self.lanes;
  }
  hand_out(first, self);
  wait_as(State::ready);
  return self.lanes;
}

void require_lane(const char* what, unsigned mask, int source, Line here) {
  if ((mask >> source & 1) == 0)
    fault("thread %s reads lane %d by %s at %s; only lanes 0x%08x take part", text(current().index).c_str(),
          source, what, text(here).c_str(), mask);
}

void join_warp(const char* what, void* mine, void (*join)(void* const* lanes), Line here) {
  Thread& self = current();
  const unsigned first = grid.running - (unsigned)lane();
  self.what = what;
  self.line = here;
  self.mask = ~0u;
  self.value = (uint64_t)mine;
  self.state = State::in_warp;
  if (!all_arrived(first, self))
    return wait_as(State::in_warp);
  void* lanes[kWarp];
  for (unsigned i = 0; i < kWarp; ++i) {
    lanes[i] = (void*)grid.threads[first + i].value;
    wake(first + i);
  }
  join(lanes); // the others stand still: what they brought is theirs until they go on
  wait_as(State::ready);
}

void give_way() {
  wake(grid.running);
  wait_as(State::ready);
}

void copy_async(void* target, const void* source, bool valid, Line here) {
  Thread& self = current();
  if (((uintptr_t)target | (uintptr_t)source) % 16 != 0)
    fault("thread %s copies 16 bytes from or to an address that is no multiple of 16 at %s",
          text(self.index).c_str(), text(here).c_str());
  Copy copy{target, valid ? source : nullptr, {}, self.groups};
  if (valid)
    std::memcpy(copy.bytes, source, 16);
  char* bytes = static_cast<char*>(target);
  *(volatile char*)bytes = bytes[0]; // an address outside is found here, not at the wait
  *(volatile char*)(bytes + 15) = bytes[15];
  note_copy_begin(target, copy.source, 16);
  self.copies.push_back(copy);
}

void commit_copies() {
  ++current().groups;
}

void wait_copies(unsigned groups_left) {
  Thread& self = current();
  std::vector<Copy> left;
  for (const Copy& copy : self.copies) {
    if (copy.group + groups_left >= self.groups) { // its group is among the last ones, or not committed
      left.push_back(copy);
      continue;
    }
    std::memcpy(copy.target, copy.bytes, 16);
    note_copy_end(copy.target, copy.source, 16);
  }
  self.copies.swap(left);
}

bool inside_a_kernel() {
  return grid.launch != nullptr;
}

Moment now() {
  const Thread& self = current();
  return {self.block->index, grid.running - self.block->first, self.block->epoch, self.clock, self.knows,
          &self.order};
}

Order& running_order() {
  return current().order;
}

} // namespace kvkeye::host_cuda

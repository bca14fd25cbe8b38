// Finds data races. The compiler's -fsanitize=thread calls a function at every load and store; here are those
// functions. Two accesses of one byte, one of them a write, by two threads race unless a barrier of the
// block, or a __syncwarp of both lanes, lies between them; by threads of two blocks, unless a fence and an
// atomic of the first are followed by an atomic and a fence of the second (order.h). No schedule has to go
// wrong for that.
#include "grid.h"

#include <cstring>
#include <memory>
#include <vector>

namespace kvkeye::host_cuda {

#ifndef KVKEYE_RACES

void watch(const char*, const void*, size_t) {}
void forget(const void*) {}
void forget_accesses() {}
void note_atomic(const void*, size_t) {}
void note_copy_begin(const void*, const void*, size_t) {}
void note_copy_end(const void*, const void*, size_t) {}

#else

namespace {

constexpr unsigned kNever = ~0u, kWarp = 32;

enum class Kind : unsigned { read, write, atomic };

struct Access {
  unsigned block = kNever, thread = 0, epoch = 0, clock = 0, fences = 0;
  Kind kind = Kind::read;
};

// What happened to one byte. Of the readers two suffice, of different warps where there are such: whoever
// writes, one of them is a stranger.
struct Cell {
  Access write, reads[2];
  bool arriving = false; // an asynchronous copy was started and not waited for
};

struct Region {
  const char* name;
  const char* memory;
  size_t bytes;
  bool shared; // of one block: another block's accesses were of another memory
  std::unique_ptr<Cell[]> cells;
};

std::vector<Region> regions;

Region* region_of(const void* address) {
  const char* byte = static_cast<const char*>(address);
  for (Region& region : regions)
    if (byte >= region.memory && byte < region.memory + region.bytes)
      return &region;
  return nullptr;
}

bool covers(const Release& release, const Access& access) {
  if (access.thread == release.thread)
    return access.fences < release.fences;
  return access.epoch < release.epoch || (access.thread / kWarp == release.thread / kWarp &&
                                          access.clock < release.knows[access.thread % kWarp]);
}

bool ordered(const Access& before, const Moment& now, bool shared) {
  if (before.block == kNever || (before.block != now.block && shared))
    return true;
  if (before.block != now.block) {
    for (const Release* release : now.order->acquired)
      if (release->block == before.block && covers(*release, before))
        return true;
    return false;
  }
  if (before.thread == now.thread || before.epoch < now.epoch)
    return true;
  return before.thread / kWarp == now.thread / kWarp && before.clock < now.knows[before.thread % kWarp];
}

const char* text(Kind kind) {
  return kind == Kind::read ? "reads" : kind == Kind::write ? "writes" : "updates";
}

[[noreturn]] void race(const Region& region, size_t byte, const Access& before, const Access& after) {
  fault("data race in %s, byte %zu of %zu: thread %u of block %u %s it, thread %u of block %u %s it, and "
        "nothing "
        "orders the two",
        region.name, byte, region.bytes, before.thread, before.block, text(before.kind), after.thread,
        after.block, text(after.kind));
}

void note_read(Cell& cell, const Access& access, const Moment& now, bool shared) {
  Access* slot = nullptr;
  for (Access& read : cell.reads)
    if (slot == nullptr && ordered(read, now, shared))
      slot = &read;
  const bool one_warp = cell.reads[0].thread / kWarp == cell.reads[1].thread / kWarp;
  if (slot == nullptr && one_warp && access.thread / kWarp != cell.reads[0].thread / kWarp)
    slot = &cell.reads[1];
  if (slot != nullptr)
    *slot = access;
}

void note(const void* address, size_t bytes, Kind kind) {
  if (!inside_a_kernel())
    return;
  Region* region = region_of(address);
  if (region == nullptr)
    return;
  const Moment moment = now();
  const Access access{moment.block, moment.thread, moment.epoch, moment.clock, moment.order->fences, kind};
  const size_t first = size_t(static_cast<const char*>(address) - region->memory);
  if (first + bytes > region->bytes)
    fault("%s: %zu bytes at %zu leave its %zu bytes", region->name, bytes, first, region->bytes);
  for (size_t byte = first; byte < first + bytes; ++byte) {
    Cell& cell = region->cells[byte];
    if (cell.arriving)
      fault("%s, byte %zu of %zu: thread %u %s it while an asynchronous copy to it is on its way",
            region->name, byte, region->bytes, moment.thread, text(kind));
    const bool both_atomic = kind == Kind::atomic && cell.write.kind == Kind::atomic;
    if (!both_atomic && !ordered(cell.write, moment, region->shared))
      race(*region, byte, cell.write, access);
    if (kind == Kind::read) {
      note_read(cell, access, moment, region->shared);
      continue;
    }
    for (const Access& read : cell.reads)
      if (!ordered(read, moment, region->shared))
        race(*region, byte, read, access);
    cell.write = access;
  }
}

void set_arriving(const void* address, size_t bytes, bool arriving) {
  if (Region* region = region_of(address); region != nullptr)
    for (size_t i = 0; i < bytes; ++i)
      region->cells[size_t(static_cast<const char*>(address) - region->memory) + i].arriving = arriving;
}

} // namespace

void watch(const char* name, const void* memory, size_t bytes) {
  const bool shared = std::strcmp(name, "shared memory") == 0;
  regions.push_back({name, static_cast<const char*>(memory), bytes, shared, std::make_unique<Cell[]>(bytes)});
}

void forget(const void* memory) {
  for (size_t i = 0; i < regions.size(); ++i)
    if (regions[i].memory == memory)
      regions.erase(regions.begin() + (ptrdiff_t)i--);
}

void forget_accesses() {
  for (Region& region : regions)
    for (size_t i = 0; i < region.bytes; ++i)
      region.cells[i] = {};
}

void note_atomic(const void* address, size_t bytes) {
  note(address, bytes, Kind::atomic);
}

void note_copy_begin(const void* target, const void* source, size_t bytes) {
  if (source != nullptr)
    note(source, bytes, Kind::read);
  note(target, bytes, Kind::write);
  set_arriving(target, bytes, true);
}

void note_copy_end(const void* target, const void* source, size_t bytes) {
  set_arriving(target, bytes, false);
  if (source != nullptr)
    note(source, bytes, Kind::read);
  note(target, bytes, Kind::write);
}

#endif

} // namespace kvkeye::host_cuda

#ifdef KVKEYE_RACES

using kvkeye::host_cuda::Kind;
using kvkeye::host_cuda::note;

#define KVKEYE_ACCESS(bytes)                                                                                 \
  void __tsan_read##bytes(void* address) {                                                                   \
    note(address, bytes, Kind::read);                                                                        \
  }                                                                                                          \
  void __tsan_write##bytes(void* address) {                                                                  \
    note(address, bytes, Kind::write);                                                                       \
  }                                                                                                          \
  void __tsan_unaligned_read##bytes(void* address) {                                                         \
    note(address, bytes, Kind::read);                                                                        \
  }                                                                                                          \
  void __tsan_unaligned_write##bytes(void* address) {                                                        \
    note(address, bytes, Kind::write);                                                                       \
  }

extern "C" {
KVKEYE_ACCESS(1)
KVKEYE_ACCESS(2)
KVKEYE_ACCESS(4)
KVKEYE_ACCESS(8)
KVKEYE_ACCESS(16)
void __tsan_read_range(void* address, size_t bytes) {
  note(address, bytes, Kind::read);
}
void __tsan_write_range(void* address, size_t bytes) {
  note(address, bytes, Kind::write);
}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_init() {}
}

#endif

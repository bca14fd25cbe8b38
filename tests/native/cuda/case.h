// A call of a launcher, read from a folder: integers in `numbers`, one file per buffer. What the kernel wrote
// goes back to the same files.
#pragma once

#include "grid.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>

namespace kvkeye::host_cuda {

class Case {
public:
  explicit Case(const std::string& folder) : folder_(folder) {
    std::FILE* file = open(folder + "/numbers", "r");
    char name[64];
    for (long long value; std::fscanf(file, "%63s %lld", name, &value) == 2;)
      numbers_[name] = value;
    std::fclose(file);
  }

  ~Case() {
    for (const auto& [name, buffer] : buffers_)
      forget(buffer.bytes.get());
  }

  int64_t number(const std::string& name) const {
    const auto found = numbers_.find(name);
    if (found == numbers_.end())
      fail("no number " + name + " in " + folder_);
    return found->second;
  }

  // The bytes of file `name`, in an allocation of just that size.
  char* buffer(const std::string& name) {
    if (const auto found = buffers_.find(name); found != buffers_.end())
      return found->second.bytes.get();
    std::FILE* file = open(folder_ + "/" + name, "rb");
    std::fseek(file, 0, SEEK_END);
    const size_t size = (size_t)std::ftell(file);
    std::rewind(file);
    Buffer& made = buffers_[name] = {std::make_unique<char[]>(size), size};
    if (std::fread(made.bytes.get(), 1, size, file) != size)
      fail("cannot read " + name);
    std::fclose(file);
    watch(buffers_.find(name)->first.c_str(), made.bytes.get(), made.size);
    return made.bytes.get();
  }

  template <class T> T* buffer(const std::string& name) { return reinterpret_cast<T*>(buffer(name)); }

  void save() const {
    for (const auto& [name, buffer] : buffers_) {
      std::FILE* file = open(folder_ + "/" + name, "wb");
      if (std::fwrite(buffer.bytes.get(), 1, buffer.size, file) != buffer.size)
        fail("cannot write " + name);
      std::fclose(file);
    }
  }

private:
  [[noreturn]] static void fail(const std::string& what) {
    std::fprintf(stderr, "%s\n", what.c_str());
    std::exit(1);
  }

  static std::FILE* open(const std::string& path, const char* mode) {
    std::FILE* file = std::fopen(path.c_str(), mode);
    if (file == nullptr)
      fail("cannot open " + path);
    return file;
  }

  struct Buffer {
    std::unique_ptr<char[]> bytes;
    size_t size;
  };

  std::string folder_;
  std::map<std::string, int64_t> numbers_;
  std::map<std::string, Buffer> buffers_;
};

// Device memory that a binding would allocate: of just that size, every byte 0xff unless told.
template <class T> class Scratch {
public:
  Scratch(const char* name, size_t count, int byte = 0xff) : memory_(new T[count]) {
    std::memset(memory_.get(), byte, count * sizeof(T));
    watch(name, memory_.get(), count * sizeof(T));
  }
  ~Scratch() { forget(memory_.get()); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* get() const { return memory_.get(); }

private:
  std::unique_ptr<T[]> memory_;
};

// An op of the command line: returns what its launcher returns.
using Call = int (*)(Case&);

std::map<std::string, Call>& calls();

struct Register {
  Register(const char* name, Call call) { calls()[name] = call; }
};

} // namespace kvkeye::host_cuda

#define KVKEYE_CALL(name)                                                                                    \
  static int call_##name(kvkeye::host_cuda::Case&);                                                          \
  static const kvkeye::host_cuda::Register register_##name(#name, &call_##name);                             \
  static int call_##name(kvkeye::host_cuda::Case& c)

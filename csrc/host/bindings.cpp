// kvkeye._host: host-side structures that are not tensor ops. Knows nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "block_pool.h"
#include "ngram_index.h"

namespace py = pybind11;
using kvkeye::BlockPool;
using kvkeye::NgramIndex;

namespace {

std::vector<std::string> to_keys(const std::vector<py::bytes>& keys) {
  return std::vector<std::string>(keys.begin(), keys.end());
}

} // namespace

PYBIND11_MODULE(_host, module) {
  module.doc() = "Native host structures of kvkeye; kvkeye._host_py and kvkeye._host_ngram_py are their "
                 "pure-Python twins.";
  py::class_<BlockPool>(module, "BlockPool")
      .def(py::init<int64_t>(), py::arg("num_blocks"))
      .def_property_readonly("num_blocks", &BlockPool::num_blocks)
      .def_property_readonly("num_free", &BlockPool::num_free)
      .def_property_readonly("num_cached", &BlockPool::num_cached)
      .def_property_readonly("num_available", &BlockPool::num_available)
      .def_property_readonly("num_used", &BlockPool::num_used)
      .def("ref_count", &BlockPool::ref_count, py::arg("block"))
      .def(
          "key_of",
          [](const BlockPool& pool, int64_t block) -> std::optional<py::bytes> {
            const auto& key = pool.key_of(block);
            return key ? std::optional<py::bytes>(py::bytes(*key)) : std::nullopt;
          },
          py::arg("block"))
      .def("allocate", &BlockPool::allocate, py::arg("count"))
      .def("retain", &BlockPool::retain, py::arg("block"))
      .def("release", &BlockPool::release, py::arg("block"))
      .def(
          "publish",
          [](BlockPool& pool, int64_t block, const py::bytes& key) { return pool.publish(block, key); },
          py::arg("block"), py::arg("key"))
      .def(
          "match",
          [](BlockPool& pool, const std::vector<py::bytes>& keys) { return pool.match(to_keys(keys)); },
          py::arg("keys"))
      .def("evict", &BlockPool::evict, py::arg("count"))
      .def("clear", &BlockPool::clear)
      .def("check", &BlockPool::check);
  py::class_<NgramIndex>(module, "NgramIndex")
      .def(py::init<int64_t, int64_t, int64_t>(), py::arg("min_length"), py::arg("max_length"),
           py::arg("max_candidates"))
      .def_property_readonly("size", &NgramIndex::size)
      .def("append", &NgramIndex::append, py::arg("tokens"))
      .def("keep_last", &NgramIndex::keep_last, py::arg("count"))
      .def("propose", &NgramIndex::propose, py::arg("num_tokens"), py::arg("width"))
      .def("propose_after", &NgramIndex::propose_after, py::arg("tail"), py::arg("num_tokens"),
           py::arg("width"));
}

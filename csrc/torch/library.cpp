// What the library says about itself. Schemas of tensor ops are defined from Python, after loading.
#include "checks.h"

namespace kvkeye {
namespace {

std::string cpu_isa() {
  const IsaChoice& choice = active_isa();
  if (choice.error != nullptr)
    fail(choice.error);
  return choice.name;
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kvkeye_cpu, m) {
  m.def("cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cpu, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}

} // namespace kvkeye

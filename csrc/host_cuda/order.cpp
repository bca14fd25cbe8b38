#include "order.h"

#include "grid.h"

#include <algorithm>
#include <deque>
#include <unordered_map>

namespace kvkeye::host_cuda {
namespace {

struct Published {
  std::deque<Release> releases; // of the launch
  std::unordered_map<const void*, std::vector<const Release*>> at;
};
Published published;

void add(std::vector<const Release*>& sum, const std::vector<const Release*>& more) {
  for (const Release* release : more)
    if (std::find(sum.begin(), sum.end(), release) == sum.end())
      sum.push_back(release);
}

} // namespace

void forget_order() {
  published.releases.clear();
  published.at.clear();
}

void fence() {
  const Moment moment = now();
  Order& order = running_order();
  Release release{moment.block, moment.thread, moment.epoch, ++order.fences, {}};
  std::copy(moment.knows, moment.knows + 32, release.knows);
  published.releases.push_back(release);
  order.released = &published.releases.back();
  add(order.acquired, order.observed);
}

void publish(const void* atomic) {
  Order& order = running_order();
  std::vector<const Release*>& found = published.at[atomic];
  add(order.observed, found);
  if (order.released != nullptr)
    add(found, {order.released});
}

void merge(std::vector<const Release*>& sum, const Order& order) {
  add(sum, order.acquired);
}

} // namespace kvkeye::host_cuda

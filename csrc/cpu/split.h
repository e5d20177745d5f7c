// Equal shares of a length.

#pragma once

#include <cstdint>

namespace vitslim {
namespace {

// Splits a length into the fewest pieces of at most `limit`, as equal as can be.
struct Split {
  int64_t length, pieces;
  Split(int64_t length, int64_t limit) : length(length), pieces((length + limit - 1) / limit) {}
  int64_t begin(int64_t piece) const { return piece * length / pieces; }
};

}  // namespace
}  // namespace vitslim

// column_sums against sums in double.

#include <cstring>

#include "../../../csrc/column_sums.h"
#include "cases.h"
#include "compare.h"

namespace emulated {
namespace {

struct Size {
  int64_t rows, columns;
  int64_t padding = 0;  // between rows
  int64_t shift = 0;    // before both arrays
};

template <typename E>
stress::Exact<E> column_sums(const stress::Exact<float>& matrix, const Size& size) {
  stress::Exact<E> sums = unwritten<E>(size.columns, size.shift);
  const int64_t before = launches;
  vitslim::column_sums_cuda(
      {matrix.data(), size.rows, size.columns, size.columns + size.padding, sums.data(), DTYPE<E>},
      vitslim::Gpu{nullptr, 3});
  if (launches - before != (size.columns > 0)) throw std::runtime_error("it is one launch");
  return sums;
}

template <typename E>
void check(const Size& size) {
  stress::Random random(size.rows * 1000 + size.columns);
  const int64_t stride = size.columns + size.padding;
  // Nothing behind the last row.
  const int64_t length = size.rows ? (size.rows - 1) * stride + size.columns : 0;
  const stress::Exact<float> matrix = random_numbers<float>(length, random, 1, size.shift);
  std::vector<double> expected(size.columns);
  for (int64_t row = 0; row < size.rows; ++row)
    for (int64_t c = 0; c < size.columns; ++c) expected[c] += matrix[row * stride + c];
  const stress::Exact<E> actual = column_sums<E>(matrix, size);
  require_close(exact(actual), expected, TOLERANCE<E>, "sums");
  if (size.columns > 1000) return;
  const stress::Exact<E> again = column_sums<E>(matrix, size);
  if (std::memcmp(actual.data(), again.data(), size_t(size.columns) * sizeof(E)) != 0)
    throw std::runtime_error("another run gives other bits");
}

// NaN, which a block has in its last column, stays there.
void check_nan() {
  const Size size{600, 19};
  stress::Exact<float> matrix(size.rows * size.columns, 0, 1.0f);
  matrix[599 * size.columns + 7] = NAN;
  const stress::Exact<float> sums = column_sums<float>(matrix, size);
  for (int64_t c = 0; c < size.columns; ++c)
    if (c == 7 ? !std::isnan(sums[c]) : sums[c] != 600.0f)
      throw std::runtime_error("NaN is not where it was");
}

}  // namespace

std::vector<Case> column_sums_cases() {
  std::vector<Case> cases;
  for (const Size& size : {Size{0, 9}, Size{3, 0}, Size{65, 20, 3, 1}})
    cases.push_back(
        {"small column_sums, " + std::to_string(size.rows) + " x " + std::to_string(size.columns),
         [size] { check<float>(size); }});
  for (const Size& size : {Size{1, 1}, Size{7, 8}, Size{257, 33}, Size{1031, 17, 0, 3}})
    cases.push_back(
        {"column_sums, " + std::to_string(size.rows) + " x " + std::to_string(size.columns),
         [size] {
           check<float>(size);
           check<vitslim::BFloat16>(size);
           check<vitslim::Half>(size);
         }});
  // More columns than are dealt out by 8.
  for (const Size& size : {Size{2000, 40}, Size{396, 100, 4}, Size{70, 4097, 1}})
    cases.push_back(
        {"column_sums, " + std::to_string(size.rows) + " x " + std::to_string(size.columns),
         [size] { check<float>(size); }});
  cases.push_back({"small column_sums, NaN", check_nan});
  return cases;
}

}  // namespace emulated

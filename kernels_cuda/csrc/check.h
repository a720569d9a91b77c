// M1_CHECK(condition, parts...): throws std::runtime_error with the parts joined, for conditions the Python ops should
// already have refused. Host code only.
#pragma once

#include <sstream>
#include <stdexcept>

namespace m1 {

template <typename... Parts>
[[noreturn]] void raise_error(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

}  // namespace m1

#define M1_CHECK(condition, ...)                     \
  do {                                               \
    if (!(condition)) ::m1::raise_error(__VA_ARGS__); \
  } while (false)

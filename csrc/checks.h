// Checks of what crosses the Python boundary. pybind11 turns invalid_argument into ValueError.
#pragma once

#include <stdexcept>
#include <string>

namespace onepass {

template <class Expected, class Got>
void check_equal(const char* name, Expected expected, Got got) {
  if (expected != got) {
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(expected) +
                                ", got " + std::to_string(got));
  }
}

template <class Bound, class Got>
void check_at_least(const char* name, Bound bound, Got got) {
  if (!(got >= bound)) {
    throw std::invalid_argument(std::string(name) + ": expected at least " + std::to_string(bound) +
                                ", got " + std::to_string(got));
  }
}

template <class Bound, class Got>
void check_at_most(const char* name, Bound bound, Got got) {
  if (!(got <= bound)) {
    throw std::invalid_argument(std::string(name) + ": expected at most " + std::to_string(bound) +
                                ", got " + std::to_string(got));
  }
}

}  // namespace onepass

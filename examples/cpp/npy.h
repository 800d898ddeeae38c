// Arrays in numpy's .npy files (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

struct Array {
  std::string type;  // numpy's, such as "<f4": byte order, kind, bytes of an element
  std::vector<int64_t> shape;
  std::vector<char> bytes;  // row by row

  size_t item_size() const;
  size_t size() const;  // number of elements
};

// Throws std::runtime_error, one line that names the file, for what is no whole .npy file of little-endian numbers in C
// order.
Array read_npy(const std::string& path);

void write_npy(const std::string& path, const Array& array);

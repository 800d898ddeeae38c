#include "npy.h"

#include <fstream>
#include <iterator>
#include <regex>
#include <stdexcept>

namespace {

constexpr char kMagic[] = "\x93NUMPY";
constexpr size_t kPrefix = 10;  // magic, version, length of the header in version 1.0
constexpr uint64_t kMostElements = uint64_t{1} << 40;

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

// The number in a type such as "<f4" that this program can hold, else 0.
size_t bytes_of(const std::string& type) {
  static const std::regex known("[<|]([biuf])([1248])");
  std::smatch found;
  if (!std::regex_match(type, found, known)) return 0;
  const char kind = found[1].str()[0];
  const size_t bytes = static_cast<size_t>(found[2].str()[0] - '0');
  if ((kind == 'b' && bytes != 1) || (kind == 'f' && bytes == 1) || (type[0] == '|') != (bytes == 1)) return 0;
  return bytes;
}

std::vector<int64_t> parse_shape(const std::string& text, const std::string& path) {
  std::vector<int64_t> shape;
  uint64_t elements = 1;
  static const std::regex number("[0-9]+");
  for (std::sregex_iterator at(text.begin(), text.end(), number), end; at != end; ++at) {
    const std::string digits = at->str();
    const uint64_t size = digits.size() > 15 ? kMostElements + 1 : std::stoull(digits);
    if (size > kMostElements || (size != 0 && elements > kMostElements / size)) {
      throw std::runtime_error(path + ": its shape (" + text + ") is too large");
    }
    elements *= size;
    shape.push_back(static_cast<int64_t>(size));
  }
  return shape;
}

}  // namespace

size_t Array::item_size() const { return bytes_of(type); }

size_t Array::size() const { return bytes.size() / item_size(); }

Array read_npy(const std::string& path) {
  const std::string content = read_file(path);
  if (content.size() < kPrefix || content.compare(0, 6, kMagic, 6) != 0) {
    throw std::runtime_error(path + ": not an .npy file, or cut short");
  }
  const auto byte = [&](size_t at) { return static_cast<size_t>(static_cast<unsigned char>(content[at])); };
  const size_t start = kPrefix + byte(8) + 256 * byte(9);
  if (byte(6) != 1 || start > content.size()) {
    throw std::runtime_error(path + ": not an .npy file of version 1.0, or cut short");
  }
  static const std::regex form(
      R"(\{'descr': '([^']{1,8})', 'fortran_order': (True|False), 'shape': \(([0-9, ]{0,999})\), ?\}\s*)");
  std::smatch found;
  const std::string header = content.substr(kPrefix, start - kPrefix);
  if (header.size() > 2048 || !std::regex_match(header, found, form)) {
    throw std::runtime_error(path + ": its header is not as numpy.save writes it");
  }
  Array array{found[1].str(), parse_shape(found[3].str(), path), {}};
  if (array.item_size() == 0) throw std::runtime_error(path + ": elements of type " + array.type + " are not supported");
  if (found[2].str() == "True") throw std::runtime_error(path + ": in Fortran order; save it in C order");
  uint64_t elements = 1;
  for (const int64_t size : array.shape) elements *= static_cast<uint64_t>(size);
  const uint64_t wanted = elements * array.item_size(), got = content.size() - start;
  if (wanted != got) {
    throw std::runtime_error(path + ": holds " + std::to_string(got) + " bytes of data, its shape needs " +
                             std::to_string(wanted));
  }
  array.bytes.assign(content.begin() + static_cast<std::ptrdiff_t>(start), content.end());
  return array;
}

void write_npy(const std::string& path, const Array& array) {
  std::string shape;
  for (const int64_t size : array.shape) shape += std::to_string(size) + ", ";
  if (array.shape.size() > 1) shape.resize(shape.size() - 2);
  std::string header = "{'descr': '" + array.type + "', 'fortran_order': False, 'shape': (" + shape + "), }";
  header.append(63 - (kPrefix + header.size()) % 64, ' ').push_back('\n');  // data begin at a multiple of 64
  std::ofstream file(path, std::ios::binary);
  file.write(kMagic, 6);
  const char rest[] = {1, 0, static_cast<char>(header.size() % 256), static_cast<char>(header.size() / 256)};
  file.write(rest, sizeof rest);
  file << header;
  file.write(array.bytes.data(), static_cast<std::streamsize>(array.bytes.size()));
  if (!file.flush()) throw std::runtime_error(path + ": cannot be written");
}

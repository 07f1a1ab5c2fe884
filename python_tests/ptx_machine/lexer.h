// Splits PTX text into tokens.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ptx {

struct Token {
    enum class Kind { word, number, string, punctuation, end };
    Kind kind;
    std::string text;
    uint64_t value;  // number: integer, or the bits of a float (0f..., 0d...)
    uint32_t line;
};

std::vector<Token> tokenize(const std::string& text);

}  // namespace ptx

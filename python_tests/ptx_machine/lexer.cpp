#include "ptx_machine/lexer.h"

#include <cctype>

#include "ptx_machine/machine.h"

namespace ptx {
namespace {

bool starts_word(char c) {
    return std::isalpha(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' ||
           c == '.';
}

bool continues_word(char c) {
    return starts_word(c) || std::isdigit(static_cast<unsigned char>(c));
}

class Lexer {
  public:
    explicit Lexer(const std::string& text) : text_(text) {}

    std::vector<Token> run() {
        std::vector<Token> tokens;
        tokens.reserve(text_.size() / 4);
        while (skip_space(), at_ < text_.size())
            tokens.push_back(next());
        tokens.push_back({Token::Kind::end, "end of file", 0, line_});
        return tokens;
    }

  private:
    char peek(size_t ahead = 0) const {
        return at_ + ahead < text_.size() ? text_[at_ + ahead] : '\0';
    }

    void skip_space() {
        for (; at_ < text_.size(); ++at_) {
            const char c = text_[at_];
            if (c == '\n') {
                ++line_;
            } else if (c == '/' && peek(1) == '/') {
                at_ = text_.find('\n', at_);
                if (at_ == std::string::npos)
                    at_ = text_.size();
                --at_;
            } else if (c == '/' && peek(1) == '*') {
                const size_t end = text_.find("*/", at_ + 2);
                if (end == std::string::npos)
                    throw LoadError("PTX line " + std::to_string(line_) + ": comment not closed");
                for (; at_ < end + 1; ++at_)
                    line_ += text_[at_] == '\n';
            } else if (!std::isspace(static_cast<unsigned char>(c))) {
                return;
            }
        }
    }

    Token next() {
        const char c = peek();
        const size_t start = at_;
        if (starts_word(c)) {
            // "shared::cta" is one word, the colon of a label is not part of it.
            while (continues_word(peek()) || (peek() == ':' && peek(1) == ':')) {
                at_ += peek() == ':' ? 2 : 1;
            }
            return {Token::Kind::word, text_.substr(start, at_ - start), 0, line_};
        }
        if (std::isdigit(static_cast<unsigned char>(c)) ||
            (c == '-' && std::isdigit(static_cast<unsigned char>(peek(1)))))
            return number();
        if (c == '"') {
            const size_t end = text_.find('"', at_ + 1);
            if (end == std::string::npos)
                throw LoadError("PTX line " + std::to_string(line_) + ": string not closed");
            at_ = end + 1;
            return {Token::Kind::string, text_.substr(start + 1, end - start - 1), 0, line_};
        }
        ++at_;
        return {Token::Kind::punctuation, std::string(1, c), 0, line_};
    }

    Token number() {
        const size_t start = at_;
        if (peek() == '-')
            ++at_;
        while (std::isalnum(static_cast<unsigned char>(peek())))
            ++at_;
        const std::string text = text_.substr(start, at_ - start);
        const bool negative = text[0] == '-';
        std::string digits = negative ? text.substr(1) : text;
        int base = 10;
        if (digits.size() > 1 && digits[0] == '0') {
            const char kind =
                static_cast<char>(std::tolower(static_cast<unsigned char>(digits[1])));
            if (kind == 'f' || kind == 'd' || kind == 'x') {
                const size_t wanted = kind == 'f' ? 8 : 16;
                digits = digits.substr(2);
                base = 16;
                if (kind != 'x' && (digits.size() != wanted || negative))
                    fail(text);
            } else if (kind == 'b') {
                digits = digits.substr(2);
                base = 2;
            } else {
                base = 8;
            }
        }
        if (!digits.empty() && digits.back() == 'U')
            digits.pop_back();
        uint64_t value = 0;
        if (digits.empty())
            fail(text);
        for (char d : digits) {
            const int digit = std::isdigit(static_cast<unsigned char>(d))
                                  ? d - '0'
                                  : 10 + std::tolower(static_cast<unsigned char>(d)) - 'a';
            if (digit < 0 || digit >= base)
                fail(text);
            value = value * static_cast<uint64_t>(base) + static_cast<uint64_t>(digit);
        }
        return {Token::Kind::number, text, negative ? 0 - value : value, line_};
    }

    [[noreturn]] void fail(const std::string& text) const {
        throw LoadError("PTX line " + std::to_string(line_) + ": number '" + text +
                        "' is not understood");
    }

    const std::string& text_;
    size_t at_ = 0;
    uint32_t line_ = 1;
};

}  // namespace

std::vector<Token> tokenize(const std::string& text) { return Lexer(text).run(); }

}  // namespace ptx

// From tokens to statements: directives, declarations, scopes, labels and instructions.
#include <algorithm>
#include <unordered_map>

#include "ptx_machine/lexer.h"
#include "ptx_machine/machine.h"
#include "ptx_machine/syntax.h"

namespace ptx {
namespace {

class Parser {
  public:
    explicit Parser(const std::string& text) : tokens_(tokenize(text)) {}

    RawModule run() {
        while (peek().kind != Token::Kind::end)
            top_level();
        return std::move(module_);
    }

  private:
    const Token& peek(size_t ahead = 0) const {
        return tokens_[std::min(at_ + ahead, tokens_.size() - 1)];
    }
    Token take() { return tokens_[at_ + 1 < tokens_.size() ? at_++ : at_]; }
    bool is(const char* text) const { return peek().text == text; }
    bool accept(const char* text) {
        if (!is(text) || peek().kind == Token::Kind::string)
            return false;
        take();
        return true;
    }
    void expect(const char* text) {
        if (!accept(text))
            fail("expected '" + std::string(text) + "', got '" + peek().text + "'");
    }
    [[noreturn]] void fail(const std::string& what) const {
        throw LoadError("PTX line " + std::to_string(peek().line) + ": " + what);
    }
    std::string word() {
        if (peek().kind != Token::Kind::word)
            fail("expected a name, got '" + peek().text + "'");
        return take().text;
    }
    uint64_t number() {
        if (peek().kind != Token::Kind::number)
            fail("expected a number, got '" + peek().text + "'");
        return take().value;
    }
    void skip_line() {
        for (const uint32_t line = peek().line; peek().line == line && !at_end();)
            take();
    }
    bool at_end() const { return peek().kind == Token::Kind::end; }

    void top_level() {
        if (is(".version") || is(".address_size")) {
            skip_line();
        } else if (accept(".target")) {
            module_.target = word();
            if (is(","))
                fail("options of .target are not known");
        } else if (is(".file")) {
            file();
        } else if (accept(".section")) {
            word();
            skip_braces();
        } else {
            bool is_extern = false;
            while (is(".visible") || is(".extern") || is(".weak"))
                is_extern |= take().text == ".extern";
            if (accept(".entry"))
                entry();
            else if (is(".shared") || is(".global"))
                module_.variables.push_back(variable(is_extern));
            else
                fail("'" + peek().text + "' is not known here");
        }
    }

    void file() {
        expect(".file");
        const uint64_t index = number();
        if (index > 10000)
            fail("number of a file out of range");
        if (module_.files.size() <= index)
            module_.files.resize(index + 1);
        module_.files[index] = take().text;
        while (accept(","))
            number();
    }

    void skip_braces() {
        expect("{");
        for (int depth = 1; depth > 0; take()) {
            if (at_end())
                fail("'}' is missing");
            depth += is("{") ? 1 : is("}") ? -1 : 0;
        }
    }

    // .shared .align 16 .b8 name[24] = {1, 2};
    RawVariable variable(bool is_extern) {
        RawVariable v;
        const std::string space = word();
        v.space = space == ".shared"  ? RawVariable::Space::shared
                  : space == ".local" ? RawVariable::Space::local
                                      : RawVariable::Space::global;
        if (accept(".align"))
            v.alignment = static_cast<uint32_t>(number());
        const uint32_t element = bytes_of_type(peek().text);
        if (!element)
            fail("type '" + peek().text + "' is not known");
        take();
        v.alignment = std::max(v.alignment, element);
        v.name = word();
        uint64_t count = 1;
        if (accept("[")) {
            if (is("]")) {
                v.dynamic = true;
                count = 0;
            } else {
                count = number();
            }
            expect("]");
        }
        if (v.dynamic && !(is_extern && v.space == RawVariable::Space::shared))
            fail("an array without a size is extern shared memory only");
        if (count * element > (1u << 24))
            fail("'" + v.name + "' is too large");
        v.bytes = static_cast<uint32_t>(count * element);
        if (accept("=")) {
            expect("{");
            do {
                const uint64_t value = number();
                for (uint32_t i = 0; i < element; ++i)
                    v.initial.push_back(static_cast<unsigned char>(value >> 8 * i));
            } while (accept(","));
            expect("}");
            if (v.initial.size() > v.bytes)
                fail("more initial values than elements of '" + v.name + "'");
        }
        expect(";");
        return v;
    }

    void entry() {
        RawKernel kernel;
        kernel.name = word();
        kernel_ = &kernel;
        source_ = {};
        if (accept("(")) {
            while (!accept(")")) {
                kernel.parameters.push_back(parameter());
                if (!is(")"))
                    expect(",");
            }
        }
        while (!is("{"))
            kernel_directive();
        scopes_.assign(1, {});
        expect("{");
        for (size_t depth = 1; depth > 0;) {
            if (accept("{")) {
                scopes_.emplace_back();
                ++depth;
            } else if (accept("}")) {
                scopes_.pop_back();
                --depth;
            } else {
                statement();
            }
        }
        module_.kernels.push_back(std::move(kernel));
    }

    // .param .u64 .ptr .global .align 1 name | .param .align 8 .b8 name[176]
    RawParameter parameter() {
        expect(".param");
        RawParameter p{"", 0, 0};
        if (accept(".align"))
            p.alignment = static_cast<uint32_t>(number());
        const uint32_t element = bytes_of_type(peek().text);
        if (!element)
            fail("type '" + peek().text + "' of a parameter is not known");
        take();
        p.alignment = std::max(p.alignment, element);
        if (accept(".ptr")) {
            if (is(".global") || is(".shared") || is(".const") || is(".local"))
                take();
            if (accept(".align"))
                number();
        }
        p.name = word();
        p.bytes = element;
        if (accept("[")) {
            p.bytes *= static_cast<uint32_t>(number());
            expect("]");
        }
        return p;
    }

    void kernel_directive() {
        const std::string name = word();
        uint64_t product = number();
        while (accept(","))
            product *= number();
        if (name == ".reqntid")
            kernel_->required_threads = static_cast<uint32_t>(product);
        else if (name == ".maxntid")
            kernel_->max_threads = static_cast<uint32_t>(product);
        else if (name != ".minnctapersm" && name != ".maxnreg")
            fail("directive '" + name + "' is not known");
    }

    void statement() {
        if (at_end())
            fail("'}' of the kernel is missing");
        if (accept(".loc")) {
            const uint32_t line = tokens_[at_ - 1].line;
            source_ = {static_cast<uint32_t>(number()), static_cast<uint32_t>(number())};
            while (peek().line == line)
                take();
        } else if (accept(".pragma")) {
            take();
            expect(";");
        } else if (accept(".reg")) {
            registers();
        } else if (is(".shared") || is(".local")) {
            kernel_->variables.push_back(variable(false));
        } else if (peek().kind == Token::Kind::word && peek(1).text == ":") {
            kernel_->labels.push_back({word(), kernel_->instructions.size()});
            expect(":");
        } else {
            instruction();
        }
    }

    // .reg .b32 %r<12>; | .reg .f16 low, high;
    void registers() {
        const std::string type = word();
        do {
            const std::string name = word();
            if (accept("<")) {
                const uint64_t count = number();
                expect(">");
                if (count > 100000)
                    fail("too many registers");
                for (uint64_t i = 0; i < count; ++i)
                    declare(name + std::to_string(i), type);
            } else {
                declare(name, type);
            }
        } while (accept(","));
        expect(";");
    }

    // A register of an inner block gets a name of its own, since another block may use the same.
    void declare(const std::string& name, const std::string& type) {
        std::string unique = name;
        if (scopes_.size() > 1)
            unique += "@" + std::to_string(kernel_->registers.size());
        scopes_.back()[name] = unique;
        kernel_->registers.push_back({unique, type.substr(1)});
    }

    std::string resolve(const std::string& name) const {
        for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
            const auto found = scope->find(name);
            if (found != scope->end())
                return found->second;
        }
        return name;
    }

    void instruction() {
        RawInstruction i;
        i.line = peek().line;
        i.source = source_;
        if (accept("@")) {
            i.guard_negated = accept("!");
            i.guard = resolve(word());
        }
        i.name = word();
        if (i.name[0] == '.')
            fail("directive '" + i.name + "' is not known here");
        while (!accept(";")) {
            i.operands.push_back(operand());
            if (!is(";"))
                expect(",");
        }
        kernel_->instructions.push_back(std::move(i));
    }

    RawOperand operand() {
        RawOperand o;
        if (accept("{")) {
            o.kind = RawOperand::Kind::vector;
            do
                o.parts.push_back(operand());
            while (accept(","));
            expect("}");
        } else if (accept("[")) {
            o.kind = RawOperand::Kind::address;
            if (peek().kind == Token::Kind::word)
                o.text = resolve(word());
            else
                o.offset = static_cast<int64_t>(number());
            while (!accept("]")) {
                accept("+");
                o.offset += static_cast<int64_t>(number());
            }
        } else if (peek().kind == Token::Kind::number) {
            o.kind = RawOperand::Kind::number;
            o.value = number();
        } else {
            o.text = resolve(word());
            if (accept("|")) {  // the two results of a setp on pairs
                RawOperand second;
                second.text = resolve(word());
                o = {RawOperand::Kind::vector, "", 0, 0, {o, second}};
            }
        }
        return o;
    }

    std::vector<Token> tokens_;
    size_t at_ = 0;
    RawModule module_;
    RawKernel* kernel_ = nullptr;
    SourceLine source_;
    std::vector<std::unordered_map<std::string, std::string>> scopes_;
};

}  // namespace

RawModule parse(const std::string& text) { return Parser(text).run(); }

uint32_t bytes_of_type(const std::string& type) {
    const std::string name = type.substr(!type.empty() && type[0] == '.');
    if (name.size() < 2 || std::string("busf").find(name[0]) == std::string::npos)
        return 0;
    const std::string bits = name.substr(1);
    if (bits == "8")
        return 1;
    if (bits == "16")
        return 2;
    if (bits == "32")
        return 4;
    return bits == "64" ? 8 : 0;
}

}  // namespace ptx

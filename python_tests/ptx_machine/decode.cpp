// From statements to instructions: names become executors, operands become places in a warp's
// registers. Everything that can be resolved is resolved here.
#include <algorithm>
#include <limits>
#include <sstream>

#include "ptx_machine/forms.h"
#include "ptx_machine/registers.h"
#include "ptx_machine/state.h"

namespace ptx {
namespace {

uint32_t align_up(uint32_t value, uint32_t alignment) {
    return (value + alignment - 1) / alignment * alignment;
}

class KernelDecoder {
  public:
    KernelDecoder(const RawKernel& raw, const RawModule& module, const Program& program)
        : raw_(raw), module_(module), program_(program) {}

    std::unique_ptr<Kernel> run() {
        kernel_ = std::make_unique<Kernel>();
        registers_ = std::make_unique<RegisterLayout>(*kernel_);
        kernel_->info.name = raw_.name;
        kernel_->info.required_threads = raw_.required_threads;
        kernel_->info.max_threads = raw_.max_threads;
        lay_out_parameters();
        lay_out_variables();
        for (const RawRegister& r : raw_.registers)
            registers_->declare(r.name, r.type);
        for (const RawLabel& label : raw_.labels)
            labels_[label.name] = static_cast<uint32_t>(label.position);
        for (const RawInstruction& i : raw_.instructions) {
            try {
                instruction(i);
            } catch (const LoadError& error) {
                throw LoadError("PTX line " + std::to_string(i.line) + ": " + i.name + ": " +
                                error.what() + " (kernel " + raw_.name + ")");
            }
        }
        finish();
        return std::move(kernel_);
    }

  private:
    void lay_out_parameters() {
        uint32_t at = 0;
        for (const RawParameter& p : raw_.parameters) {
            at = align_up(at, p.alignment);
            kernel_->info.parameters.push_back({p.name, at, p.bytes, p.alignment});
            symbols_[p.name] = at;
            at += p.bytes;
        }
        kernel_->info.parameter_bytes = at;
    }

    void lay_out_variables() {
        uint32_t shared = kSharedBase, local = kLocalBase;
        const auto place = [&](const RawVariable& v) {
            if (v.space == RawVariable::Space::global || v.dynamic)
                return;
            uint32_t& at = v.space == RawVariable::Space::shared ? shared : local;
            at = align_up(at, v.alignment);
            symbols_[v.name] = at;
            at += v.bytes;
        };
        for (const RawVariable& v : module_.variables)
            place(v);
        for (const RawVariable& v : raw_.variables)
            place(v);
        for (const RawVariable& v : module_.variables)
            if (v.dynamic)
                symbols_[v.name] = shared = align_up(shared, v.alignment);
        kernel_->info.static_shared_bytes = shared - kSharedBase;
        kernel_->local_bytes = local == kLocalBase ? 0 : local - kLocalBase;
        for (const auto& global : program_.globals)
            symbols_[global->name] = reinterpret_cast<uint64_t>(global->storage.data());
    }

    void read(const Register& r) {
        ops_.push_back(r.place);
        reads_.push_back(r.number);
    }
    void write(const Register& r) {
        ops_.push_back(r.place);
        writes_.push_back(r.number);
    }

    void source(const RawOperand& o, Width width) {
        if (o.kind == RawOperand::Kind::number)
            read(registers_->constant(o.value, width));
        else if (o.kind == RawOperand::Kind::word)
            read(registers_->known(o.text, width));
        else
            throw LoadError("an address where a register or a constant is expected");
    }
    void target(const RawOperand& o, Width width) {
        if (o.kind != RawOperand::Kind::word)
            throw LoadError("the result is not a register");
        write(registers_->known(o.text, width));
    }

    // A register that may be wider than the type.
    void loose(const RawOperand& o, uint32_t bytes, bool writes) {
        if (o.kind == RawOperand::Kind::number && !writes) {
            const Width width = bytes == 8   ? Width::bits64
                                : bytes == 4 ? Width::bits32
                                             : Width::bits16;
            read(registers_->constant(o.value, width));
            ops_.push_back(static_cast<uint32_t>(width));
            return;
        }
        if (o.kind != RawOperand::Kind::word)
            throw LoadError("an address where a register is expected");
        const Register r = registers_->known(o.text);
        const uint32_t held = r.width == Width::bits64   ? 8
                              : r.width == Width::bits32 ? 4
                              : r.width == Width::bits16 ? 2
                                                         : 0;
        if (held < bytes)
            throw LoadError("'" + o.text + "' is narrower than the type");
        writes ? write(r) : read(r);
        ops_.push_back(static_cast<uint32_t>(r.width));
    }

    void symbol_or_source(const RawOperand& o, Width width) {
        Register r;
        if (o.kind == RawOperand::Kind::word && width == Width::bits32 &&
            registers_->special(o.text, r))
            return read(r);
        const auto symbol = symbols_.find(o.text);
        if (o.kind == RawOperand::Kind::word && symbol != symbols_.end())
            return read(registers_->constant(symbol->second, width));
        source(o, width);
    }

    void address(const RawOperand& o) {
        if (o.kind != RawOperand::Kind::address)
            throw LoadError("an address is expected");
        if (o.offset < std::numeric_limits<int32_t>::min() ||
            o.offset > std::numeric_limits<int32_t>::max())
            throw LoadError("the offset of an address has more than 32 bits");
        const auto symbol = symbols_.find(o.text);
        Register base;
        if (symbol != symbols_.end()) {
            base = registers_->constant(symbol->second, Width::bits64);
        } else {
            base = registers_->known(o.text);
            if (base.width != Width::bits32 && base.width != Width::bits64)
                throw LoadError("'" + o.text + "' cannot hold an address");
        }
        read(base);
        ops_.push_back(base.width == Width::bits64);
        ops_.push_back(static_cast<uint32_t>(static_cast<int32_t>(o.offset)));
    }

    void operand(char letter, const RawOperand& o, uint32_t bytes) {
        switch (letter) {
        case 'P':
            return target(o, Width::predicate);
        case 'p':
            return source(o, Width::predicate);
        case 'H':
            return target(o, Width::bits16);
        case 'h':
            return source(o, Width::bits16);
        case 'D':
            return target(o, Width::bits32);
        case 'd':
            return source(o, Width::bits32);
        case 'Q':
            return target(o, Width::bits64);
        case 'q':
            return source(o, Width::bits64);
        case 'X':
            return loose(o, bytes, true);
        case 'x':
            return loose(o, bytes, false);
        case '_':
        case '~':
            if (o.kind == RawOperand::Kind::word && o.text == "_")
                return ops_.push_back(kSink);
            return target(o, letter == '_' ? Width::bits32 : Width::bits16);
        case 's':
            return symbol_or_source(o, Width::bits32);
        case 'S':
            return symbol_or_source(o, Width::bits64);
        case 'm':
            return address(o);
        case 'r': {
            const Register r = registers_->known(o.text, Width::bits32);
            ops_.push_back(r.place);
            return ops_.push_back(r.number);
        }
        case 'n':
            if (o.kind != RawOperand::Kind::number)
                throw LoadError("a constant is expected");
            return ops_.push_back(static_cast<uint32_t>(o.value));
        case 'b': {
            const auto found = labels_.find(o.text);
            if (found == labels_.end())
                throw LoadError("label '" + o.text + "' is not defined");
            return ops_.push_back(found->second);
        }
        }
        throw LoadError(std::string("operand letter ") + letter);
    }

    // The operands one after the other, and how they are grouped: "o{oo}". Braces around a single
    // one mean nothing.
    static std::string flatten(const std::vector<RawOperand>& from,
                               std::vector<const RawOperand*>& to) {
        std::string shape;
        for (const RawOperand& o : from) {
            if (o.kind == RawOperand::Kind::vector) {
                const std::string inner = flatten(o.parts, to);
                shape += o.parts.size() == 1 ? inner : "{" + inner + "}";
            } else {
                to.push_back(&o);
                shape += 'o';
            }
        }
        return shape;
    }

    static bool matches(const char* letters, const std::string& shape) {
        if (std::char_traits<char>::length(letters) != shape.size())
            return false;
        for (size_t k = 0; k < shape.size(); ++k) {
            const bool brace = letters[k] == '{' || letters[k] == '}';
            if (brace ? letters[k] != shape[k] : shape[k] != 'o')
                return false;
        }
        return true;
    }

    // The form whose operands these are; it leaves them in ops_, reads_ and writes_.
    const Form* choose(const std::vector<Form>& candidates,
                       const std::vector<const RawOperand*>& operands, const std::string& shape) {
        std::string reason = "operands of the form " + shape + " are not known";
        for (const Form& form : candidates) {
            if (!matches(form.operands, shape))
                continue;
            ops_.clear();
            reads_.clear();
            writes_.clear();
            try {
                size_t next = 0;
                for (const char* letter = form.operands; *letter; ++letter)
                    if (*letter != '{' && *letter != '}')
                        operand(*letter, *operands[next++], form.bytes);
                return &form;
            } catch (const LoadError& error) {
                reason = error.what();
            }
        }
        throw LoadError(reason);
    }

    void instruction(const RawInstruction& raw) {
        const std::vector<Form>* candidates = forms().find(raw.name);
        if (!candidates)
            throw LoadError("the instruction is not known");
        std::vector<const RawOperand*> operands;
        const std::string shape = flatten(raw.operands, operands);
        const Form* form = choose(*candidates, operands, shape);
        Instruction i;
        i.execute = form->execute;
        i.flow = form->flow;
        i.joins_halves = raw.name == "mov.b32" && std::string(form->operands) == "D{hh}";
        i.line = raw.line;
        i.source = raw.source;
        if (!raw.guard.empty()) {
            const Register guard = registers_->known(raw.guard, Width::predicate);
            i.guarded = true;
            i.guard_negated = raw.guard_negated;
            i.guard = guard.place;
            i.guard_number = guard.number;
        }
        if (i.flow == Flow::branch)
            i.target = ops_[0];
        i.read_count = static_cast<uint16_t>(reads_.size());
        i.write_count = static_cast<uint16_t>(writes_.size());
        starts_.push_back(kernel_->pool.size());
        for (const auto* list : {&ops_, &reads_, &writes_})
            kernel_->pool.insert(kernel_->pool.end(), list->begin(), list->end());
        op_counts_.push_back(ops_.size());
        kernel_->code.push_back(i);
    }

    // The pool has its final address only now.
    void finish() {
        for (size_t k = 0; k < kernel_->code.size(); ++k) {
            Instruction& i = kernel_->code[k];
            i.op = kernel_->pool.data() + starts_[k];
            i.reads = i.op + op_counts_[k];
            i.writes = i.reads + i.read_count;
        }
    }

    const RawKernel& raw_;
    const RawModule& module_;
    const Program& program_;
    std::unique_ptr<Kernel> kernel_;
    std::unique_ptr<RegisterLayout> registers_;
    std::unordered_map<std::string, uint64_t> symbols_;
    std::unordered_map<std::string, uint32_t> labels_;
    std::vector<uint32_t> ops_, reads_, writes_;
    std::vector<size_t> starts_, op_counts_;
};

}  // namespace

std::unique_ptr<Program> load(const std::string& text) {
    const RawModule raw = parse(text);
    auto program = std::make_unique<Program>();
    program->target = raw.target;
    program->files = raw.files;
    std::istringstream stream(text);
    for (std::string line; std::getline(stream, line);)
        program->lines.push_back(line);
    for (const RawVariable& v : raw.variables) {
        if (v.space != RawVariable::Space::global)
            continue;
        auto global = std::make_unique<Global>();
        global->name = v.name;
        global->storage = v.initial;
        global->storage.resize(v.bytes);
        program->globals.push_back(std::move(global));
    }
    for (const RawKernel& kernel : raw.kernels) {
        if (program->kernels.count(kernel.name))
            throw LoadError("kernel " + kernel.name + " is defined twice");
        program->kernels[kernel.name] = KernelDecoder(kernel, raw, *program).run();
    }
    return program;
}

}  // namespace ptx

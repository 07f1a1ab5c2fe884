// Which synchronizations a launch could not do without, and which of its waits could not wait for
// one group less. Of copies and products it finds them itself.
//
// A change of the text is one line: a commit or a wait left out, or a wait that leaves one group
// more in flight. Of every operation that a wait has ended, this knows the changes with which the
// operation would still be in flight, until a later wait ends it in spite of them. Whoever touches
// meanwhile what the operation reads or writes needs the lines as they are. So an empty group, a
// group that joins the next one before the wait for both, or a wait behind another one need
// nothing.
#pragma once

#include <cstdint>
#include <set>
#include <vector>

namespace ptx {

// When a fence was executed last, and when another line of the PTX was one.
struct LastFence {
    uint32_t at = 0, line = 0;

    void set(uint32_t when, uint32_t at_line) {
        if (at_line != line)
            elsewhere_ = at;
        at = when;
        line = at_line;
    }
    // What `at` would be without the fence of a line; 0: as it is.
    uint32_t without(uint32_t other) const { return other && other == line ? elsewhere_ : at; }

  private:
    uint32_t elsewhere_ = 0;
};

// Of the groups of one thread, or of a warp's products.
struct Groups {
    std::vector<uint32_t> commits;  // their lines

    struct Wait {
        uint32_t line, pending;
    };
};

class Needs {
  public:
    // An operation of a group has ended at a wait. Returns its number, from 1.
    uint32_t end(const Groups& groups, uint32_t group, Groups::Wait wait);
    // The same operation at a later wait. False: it has ended whatever is changed.
    bool is_late(uint32_t operation, const Groups& groups, uint32_t group, Groups::Wait wait);
    void touch(uint32_t operation);                   // 0: none
    void add(uint32_t line) { lines_.insert(line); }  // of another kind
    void forget();                                    // the operations; their CTA has returned

    const std::set<uint32_t>& lines() const { return lines_; }
    const std::set<uint32_t>& exact_waits() const { return exact_waits_; }

  private:
    struct Change {
        uint32_t line;
        bool looser;  // a wait for one group less
    };

    static bool ends(const Change& change, const Groups& groups, uint32_t group, Groups::Wait wait);

    std::vector<std::vector<Change>> late_{1};  // by operation
    std::set<uint32_t> lines_, exact_waits_;
};

}  // namespace ptx

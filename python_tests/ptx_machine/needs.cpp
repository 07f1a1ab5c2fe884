#include "ptx_machine/needs.h"

#include <algorithm>

namespace ptx {

// Whether the wait ends the operations of a group in spite of the change.
bool Needs::ends(const Change& change, const Groups& groups, uint32_t group, Groups::Wait wait) {
    auto commits = static_cast<uint32_t>(groups.commits.size());
    // Without its commit, a group is one with the next; those before it are nearer to the last.
    commits -= static_cast<uint32_t>(
        std::count(groups.commits.begin() + group, groups.commits.end(), change.line));
    if (change.line != wait.line)
        return group + wait.pending < commits;
    return change.looser && group + wait.pending + 1 < commits;
}

uint32_t Needs::end(const Groups& groups, uint32_t group, Groups::Wait wait) {
    std::vector<Change> late{{wait.line, false}, {wait.line, true}};
    for (size_t k = group; k < groups.commits.size(); ++k) {
        const uint32_t line = groups.commits[k];
        if (std::find(groups.commits.begin() + group, groups.commits.begin() + k, line) ==
            groups.commits.begin() + k)
            late.push_back({line, false});
    }
    late_.push_back(std::move(late));
    const auto operation = static_cast<uint32_t>(late_.size() - 1);
    is_late(operation, groups, group, wait);
    return operation;
}

bool Needs::is_late(uint32_t operation, const Groups& groups, uint32_t group, Groups::Wait wait) {
    std::vector<Change>& late = late_[operation];
    late.erase(std::remove_if(late.begin(), late.end(),
                              [&](const Change& c) { return ends(c, groups, group, wait); }),
               late.end());
    return !late.empty();
}

void Needs::touch(uint32_t operation) {
    for (const Change& change : late_[operation])
        (change.looser ? exact_waits_ : lines_).insert(change.line);
    late_[operation].clear();
}

void Needs::forget() { late_.resize(1); }

}  // namespace ptx

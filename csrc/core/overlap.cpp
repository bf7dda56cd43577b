#include "core/overlap.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "core/normalize.h"

namespace paramkit {

namespace {

struct Span {
  const char* begin;
  const char* end;
};

bool before(const Span& a, const Span& b) { return a.begin < b.begin; }

// Merges neighbouring ascending stretches until one is left. Tensors mostly come in the order in which
// they were allocated: the 31,337 of a mixture of experts are 58 stretches, which is 6 passes, where
// std::sort took a fifth of the whole call.
void sort_stretches(std::vector<Span>& spans) {
  std::vector<size_t> starts;
  for (size_t i = 0; i < spans.size(); ++i) {
    if (i == 0 || before(spans[i], spans[i - 1])) starts.push_back(i);
  }
  if (starts.size() < 2) return;
  starts.push_back(spans.size());
  std::vector<Span> merged(spans.size());
  while (starts.size() > 2) {
    std::vector<size_t> left;
    const auto at = [&](std::vector<Span>& all, size_t i) { return all.begin() + static_cast<ptrdiff_t>(starts[i]); };
    for (size_t i = 0; i + 1 < starts.size(); i += 2) {
      const size_t middle = i + 1, end = std::min(i + 2, starts.size() - 1);
      std::merge(at(spans, i), at(spans, middle), at(spans, middle), at(spans, end), at(merged, i), before);
      left.push_back(starts[i]);
    }
    left.push_back(spans.size());
    starts.swap(left);
    spans.swap(merged);
  }
}

// Where a task writes: loops, outermost first, around a run of bytes.
struct Box {
  int64_t begin, reach;  // of all of it
  const Dim* dims;
  int rank;
};

// Whether boxes that write into one stretch of memory have no byte in common, as far as steps tell: columns of
// one matrix, or channels of one kernel. Their outermost loops must have one stride, in which what is inside
// them fits; what is inside is then compared, from where each begins within that stride.
bool apart(std::vector<Box> boxes, int depth = 0) {
  std::sort(boxes.begin(), boxes.end(), [](const Box& a, const Box& b) { return a.begin < b.begin; });
  for (size_t first = 0, last = 0; first < boxes.size(); first = last) {
    // Those that meet: each begins before the ones before it end.
    int64_t end = boxes[first].begin + boxes[first].reach;
    for (last = first + 1; last < boxes.size() && boxes[last].begin < end; ++last) {
      end = std::max(end, boxes[last].begin + boxes[last].reach);
    }
    if (last == first + 1) continue;
    constexpr int kDeepest = 4;
    std::vector<Box> inside;
    const int64_t origin = boxes[first].begin;
    for (size_t i = first; i < last; ++i) {
      const Box& box = boxes[i];
      if (depth == kDeepest || box.rank == 0 || box.dims[0].dst != boxes[first].dims[0].dst) return false;
      const int64_t stride = box.dims[0].dst;
      const Box row{(box.begin - origin) % stride, box.reach - (box.dims[0].size - 1) * stride, box.dims + 1,
                    box.rank - 1};
      if (row.begin + row.reach > stride) return false;
      inside.push_back(row);
    }
    if (!apart(std::move(inside), depth + 1)) return false;
  }
  return true;
}

// What tasks write and read. The memory for it is kept.
struct Spans {
  std::vector<Span> writes, reads;
  std::vector<Dim> loops;  // of the tasks that have any, outermost first

  static Spans& empty() {
    static thread_local Spans spans;
    spans.writes.clear();
    spans.reads.clear();
    return spans;
  }

  void add(const Tasks& tasks) {
    const Program& program = *tasks.program;
    for (size_t t = tasks.first; t < tasks.last; ++t) {
      const Task& task = program.tasks[t];
      int64_t dst = task.run;
      int64_t src = task.family == Family::Fill ? task.src_width() : task.run / task.width() * task.src_width();
      for (int i = 0; i < task.rank; ++i) {
        const Dim& dim = program.dims[task.dims + static_cast<size_t>(i)];
        dst += (dim.size - 1) * dim.dst;
        src += (dim.size - 1) * dim.src;
      }
      writes.push_back({task.dst, task.dst + dst});
      // A number of the host's is nobody's.
      if (!task.number) reads.push_back({task.src, task.src + src});
    }
  }

  bool meet(const std::vector<Tasks>& all) {
    sort_stretches(writes);
    // Merged where they meet, in place.
    size_t n = 0;
    for (const Span& write : writes) {
      if (n > 0 && write.begin < writes[n - 1].end) {
        writes[n - 1].end = std::max(writes[n - 1].end, write.end);
      } else {
        writes[n++] = write;
      }
    }
    const bool met = n < writes.size();
    writes.resize(n);
    if (met && !steps_apart(all)) return true;
    sort_stretches(reads);
    size_t w = 0;
    for (const Span& read : reads) {
      while (w < writes.size() && writes[w].end <= read.begin) ++w;
      if (w < writes.size() && writes[w].begin < read.end) return true;
    }
    return false;
  }

 private:
  bool steps_apart(const std::vector<Tasks>& all) {
    std::vector<Box> boxes;
    std::vector<size_t> at;  // of each box in loops
    loops.clear();
    for (const Tasks& tasks : all) {
      for (size_t t = tasks.first; t < tasks.last; ++t) {
        const Task& task = tasks.program->tasks[t];
        const Dim* dims = tasks.program->dims.data() + task.dims;
        at.push_back(loops.size());
        loops.insert(loops.end(), dims, dims + task.rank);
        Dim* own = loops.data() + at.back();
        sort_dims(own, task.rank, [](const Dim& a, const Dim& b) { return a.dst > b.dst; });
        Box box{reinterpret_cast<intptr_t>(task.dst), task.run, nullptr, task.rank};
        for (int i = 0; i < task.rank; ++i) box.reach += (own[i].size - 1) * own[i].dst;
        boxes.push_back(box);
      }
    }
    for (size_t i = 0; i < boxes.size(); ++i) boxes[i].dims = loops.data() + at[i];
    return apart(std::move(boxes));
  }
};

}  // namespace

bool share_memory(const Program& program, size_t first, size_t last) { return share_memory({{&program, first, last}}); }

bool share_memory(const std::vector<Tasks>& all) {
  Spans& spans = Spans::empty();
  for (const Tasks& tasks : all) spans.add(tasks);
  return spans.meet(all);
}

}  // namespace paramkit

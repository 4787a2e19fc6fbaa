// A timeline as one static SVG: a panel per device with stacked areas by purpose, lines for plan
// and budget, tokens on a second axis, marks, and a strip that names the phases.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "timeline_text.h"

namespace fathom {
namespace {

using run::human_bytes;
using run::kPurposeColours;
using run::kStackOrder;
using run::xml_quote;

constexpr double kWidth = 960, kLeft = 84, kRight = 72, kPlotHeight = 250;
constexpr double kHead = 76;   // title and sentence
constexpr double kAbove = 58;  // device name and labels of marks
constexpr double kBelow = 58;  // strip of phases and the axis of time
constexpr double kPlotWidth = kWidth - kLeft - kRight;
constexpr double kLegendRow = 22;

constexpr const char* kStyle =
    "svg{--ground:#fff;--ink:#1b1f24;--quiet:#5d6673;--grid:#e4e7eb;--budget:#b3261e;"
    "background:var(--ground);font:12px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;"
    "font-variant-numeric:tabular-nums}\n"
    "@media(prefers-color-scheme:dark){svg{--ground:#14181d;--ink:#e8eaed;--quiet:#9aa4b1;"
    "--grid:#2a3038;--budget:#ff8a80}}\n"
    "text{fill:var(--ink)}.quiet{fill:var(--quiet)}.end{text-anchor:end}.middle{text-anchor:middle}"
    ".title{font-size:19px;font-weight:600}.name{font-size:14px;font-weight:600}"
    ".grid{stroke:var(--grid)}.axis{stroke:var(--quiet)}.area{stroke:var(--ground);stroke-width:.6}"
    ".plan{stroke:var(--ink);stroke-dasharray:6 4;fill:none;stroke-width:1.4}"
    ".budget{stroke:var(--budget);fill:none;stroke-width:1.6}"
    ".tokens{stroke:var(--ink);fill:none;stroke-width:1.5}"
    ".halo{stroke:var(--ground);fill:none;stroke-width:3.5;opacity:.8}"
    ".mark{stroke:var(--quiet);stroke-dasharray:2 3}"
    ".start{fill:#8a8f98}.load{fill:#6c7a93}.prefill{fill:#3f6fb0}.decode{fill:#2b7a5b}"
    ".strip{fill:#fff;font-size:11px}";

class SvgWriter {
 public:
  explicit SvgWriter(const Timeline& timeline) : t_(timeline) {}

  std::string run() {
    const size_t n_used =
        std::count_if(kStackOrder.begin(), kStackOrder.end(), [&](Purpose p) { return used(p); });
    const double rows = std::ceil(static_cast<double>(n_used + 3) / 6);
    const double panel = kAbove + kPlotHeight + kBelow;
    const double height =
        kHead + panel * static_cast<double>(t_.devices.size()) + rows * kLegendRow + 16;
    out_ = fmt::format(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0:.0f} {1:.0f}\" "
        "width=\"{0:.0f}\" "
        "height=\"{1:.0f}\" role=\"img\" aria-labelledby=\"title summary\">\n<style>{2}</style>\n"
        "<rect width=\"100%\" height=\"100%\" style=\"fill:var(--ground)\"/>\n"
        "<text id=\"title\" class=\"title\" x=\"24\" y=\"36\">Memory over time</text>\n"
        "<text id=\"summary\" x=\"24\" y=\"58\">{3}</text>\n",
        kWidth, height, kStyle, xml_quote(t_.summary()));
    for (size_t d = 0; d < t_.devices.size(); ++d)
      device(t_.devices[d], kHead + panel * static_cast<double>(d));
    legend(kHead + panel * static_cast<double>(t_.devices.size()) + 8);
    return std::move(out_) + "</svg>\n";
  }

 private:
  template <class... T>
  void add(fmt::format_string<T...> format, T&&... values) {
    fmt::format_to(std::back_inserter(out_), format, std::forward<T>(values)...);
  }

  bool used(Purpose purpose) const {
    return std::any_of(t_.devices.begin(), t_.devices.end(), [&](const TimelineDevice& d) {
      return d.peaks[static_cast<size_t>(purpose)] > 0;
    });
  }
  double x_of(double seconds) const {
    return kLeft + kPlotWidth * seconds / std::max(t_.seconds, 1e-9);
  }

  void device(const TimelineDevice& device, double top) {
    top_ = top + kAbove;
    scale_ = run::scale_of(device);
    most_tokens_ = 1;
    for (const TimelinePoint& p : device.points) most_tokens_ = std::max(most_tokens_, p.n_tokens);
    const std::string budget = scale_.shows_budget ? ""
                                                   : fmt::format(", budget {} is above this scale",
                                                                 human_bytes(device.budget_bytes));
    add("<g>\n<text class=\"name\" x=\"{}\" y=\"{:.0f}\">{}</text>"
        "<text class=\"quiet end\" x=\"{}\" y=\"{:.0f}\">peak {}{}</text>\n",
        kLeft, top + 16, xml_quote(device.name), kWidth - kRight, top + 16,
        human_bytes(device.peak_bytes), budget);
    axes();
    areas(device);
    tokens(device);
    // The plan's name stands on the left, the budget's on the right: they may be one line.
    level(device.planned_bytes, "plan", kLeft + 6, "start");
    if (scale_.shows_budget) level(device.budget_bytes, "budget", kWidth - kRight - 6, "end");
    all_marks(top);
    phases(device);
    out_ += "</g>\n";
  }

  double y_of(double bytes) const {
    return top_ + kPlotHeight * (1 - std::min(bytes / scale_.top, 1.0));
  }

  void axes() {
    const double step = run::byte_tick_step(scale_.top, 5);
    for (double bytes = 0; bytes <= scale_.top; bytes += step)
      add("<line class=\"grid\" x1=\"{0}\" x2=\"{1}\" y1=\"{2:.1f}\" y2=\"{2:.1f}\"/>"
          "<text class=\"quiet end\" x=\"{3}\" y=\"{4:.1f}\">{5}</text>\n",
          kLeft, kWidth - kRight, y_of(bytes), kLeft - 8, y_of(bytes) + 4,
          human_bytes(static_cast<int64_t>(bytes)));
    const double most = static_cast<double>(most_tokens_);
    for (double n = 0, by = std::max(1.0, run::tick_step(most, 4)); n <= most; n += by)
      add("<text class=\"quiet\" x=\"{}\" y=\"{:.1f}\">{}</text>", kWidth - kRight + 8,
          top_ + kPlotHeight * (1 - n / (1.06 * most)) + 4,
          run::grouped_digits(static_cast<int64_t>(n)));
    add("<text class=\"quiet\" x=\"{}\" y=\"{:.1f}\">tokens</text>\n", kWidth - kRight + 8,
        top_ - 8);
    const double time_step = run::time_tick_step(t_.seconds, 8);
    for (double s = 0; s <= t_.seconds * 1.0001; s += time_step)
      add("<line class=\"axis\" x1=\"{0:.1f}\" x2=\"{0:.1f}\" y1=\"{1:.1f}\" y2=\"{2:.1f}\"/>"
          "<text class=\"quiet middle\" x=\"{0:.1f}\" y=\"{3:.1f}\">{4}</text>\n",
          x_of(s), top_ + kPlotHeight + 20, top_ + kPlotHeight + 25, top_ + kPlotHeight + 39,
          run::human_duration(s));
  }

  // The whole stack first, then without its top purpose, and so on: each path is one edge.
  void areas(const TimelineDevice& device) {
    for (size_t layers = kStackOrder.size(); layers > 0; --layers) {
      const auto purpose = static_cast<size_t>(kStackOrder[layers - 1]);
      if (device.peaks[purpose] == 0) continue;
      add("<path class=\"area\" style=\"fill:{}\" d=\"M{} {:.1f}", kPurposeColours[purpose], kLeft,
          top_ + kPlotHeight);
      double last_y = -1;
      for (const TimelinePoint& p : device.points) {
        int64_t sum = 0;
        for (size_t i = 0; i < layers; ++i) sum += p.bytes[static_cast<size_t>(kStackOrder[i])];
        const double y = y_of(static_cast<double>(sum));
        if (std::fabs(y - last_y) < 0.05) continue;
        add("H{:.1f}V{:.1f}", x_of(p.seconds), y);
        last_y = y;
      }
      add("H{}V{:.1f}Z\"><title>{}, peak {}</title></path>\n", kWidth - kRight, top_ + kPlotHeight,
          purpose_name(static_cast<Purpose>(purpose)), human_bytes(device.peaks[purpose]));
    }
  }

  void tokens(const TimelineDevice& device) {
    std::string path;
    double last_x = -1, last_y = -1;
    for (const TimelinePoint& p : device.points) {
      const double x = x_of(p.seconds);
      const double y = top_ + kPlotHeight * (1 - static_cast<double>(p.n_tokens) /
                                                     (1.06 * double(most_tokens_)));
      if (std::fabs(x - last_x) < 0.5 && std::fabs(y - last_y) < 0.5) continue;
      path += fmt::format("{}{:.1f} {:.1f}", path.empty() ? "M" : "L", x, y);
      last_x = x, last_y = y;
    }
    add("<path class=\"halo\" d=\"{0}\"/><path class=\"tokens\" d=\"{0}\"/>\n", path);
  }

  void level(int64_t bytes, const char* name, double x, const char* anchor) {
    if (bytes == 0) return;
    const double y = y_of(static_cast<double>(bytes));
    add("<line class=\"halo\" x1=\"{0}\" x2=\"{1}\" y1=\"{2:.1f}\" y2=\"{2:.1f}\"/>"
        "<line class=\"{3}\" x1=\"{0}\" x2=\"{1}\" y1=\"{2:.1f}\" y2=\"{2:.1f}\"/>"
        "<text x=\"{4}\" y=\"{5:.1f}\" text-anchor=\"{6}\">{3} {7}</text>\n",
        kLeft, kWidth - kRight, y, name, x, y - 5, anchor, human_bytes(bytes));
  }

  // Labels take the first of two rows in which they do not run into the one before.
  void all_marks(double top) {
    double free_from[2] = {kLeft, kLeft};
    for (const TimelineMark& mark : t_.marks) {
      const double x = x_of(mark.seconds);
      const std::string label =
          mark.count > 1 ? fmt::format("{} x{}", mark.kind, mark.count) : mark.kind;
      add("<line class=\"mark\" x1=\"{0:.1f}\" x2=\"{0:.1f}\" y1=\"{1:.1f}\" y2=\"{2:.1f}\">"
          "<title>{3} at {4}: {5}</title></line>\n",
          x, top_, top_ + kPlotHeight, xml_quote(label), run::human_duration(mark.seconds),
          xml_quote(mark.text));
      for (int row = 0; row < 2; ++row) {
        if (x < free_from[row] || x + 7.0 * double(label.size()) > kWidth - kRight) continue;
        free_from[row] = x + 7.0 * static_cast<double>(label.size()) + 8;
        add("<text class=\"quiet\" x=\"{:.1f}\" y=\"{:.0f}\">{}</text>\n", x, top + 34 + 14 * row,
            xml_quote(label));
        break;
      }
    }
  }

  void phases(const TimelineDevice& device) {
    const double y = top_ + kPlotHeight + 2;
    for (size_t i = 0; i < device.points.size();) {
      size_t end = i;
      while (end < device.points.size() && device.points[end].phase == device.points[i].phase)
        ++end;
      const double from = x_of(device.points[i].seconds);
      const double to =
          end < device.points.size() ? x_of(device.points[end].seconds) : kWidth - kRight;
      const std::string_view name = timeline_phase_name(device.points[i].phase);
      add("<rect class=\"{0}\" x=\"{1:.1f}\" y=\"{2:.1f}\" width=\"{3:.1f}\" height=\"16\">"
          "<title>{0}</title></rect>",
          name, from, y, std::max(to - from, 0.5));
      if (to - from > 8.0 * static_cast<double>(name.size()))
        add("<text class=\"strip middle\" x=\"{:.1f}\" y=\"{:.1f}\">{}</text>", (from + to) / 2,
            y + 12, name);
      i = end;
    }
    out_ += '\n';
  }

  void legend(double top) {
    int at = 0;
    const auto place = [&](const std::string& sign, std::string_view name) {
      const double x = kLeft + 138.0 * (at % 6), y = top + kLegendRow * (at / 6) + 12;
      add("<g transform=\"translate({:.0f} {:.0f})\">{}<text x=\"22\" y=\"4\">{}</text></g>\n", x,
          y, sign, name);
      ++at;
    };
    for (auto it = kStackOrder.rbegin(); it != kStackOrder.rend(); ++it)
      if (used(*it))
        place(fmt::format("<rect width=\"14\" height=\"14\" y=\"-7\" rx=\"2\" style=\"fill:{}\"/>",
                          kPurposeColours[static_cast<size_t>(*it)]),
              purpose_name(*it));
    for (const auto& [style, name] :
         {std::pair{"tokens", "tokens in context"}, std::pair{"plan", "planned peak"},
          std::pair{"budget", "budget"}})
      place(fmt::format("<line class=\"{}\" x1=\"0\" x2=\"16\"/>", style), name);
  }

  const Timeline& t_;
  std::string out_;
  double top_ = 0;  // of the plot being drawn
  run::Scale scale_;
  int64_t most_tokens_ = 1;
};

}  // namespace

std::string Timeline::to_svg() const {
  return SvgWriter(*this).run();
}

}  // namespace fathom

/*
   Copyright The guest-pull Authors.

   Licensed under the Apache License, Version 2.0 (the "License");
   you may not use this file except in compliance with the License.
   You may obtain a copy of the License at

       http://www.apache.org/licenses/LICENSE-2.0

   Unless required by applicable law or agreed to in writing, software
   distributed under the License is distributed on an "AS IS" BASIS,
   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
   See the License for the specific language governing permissions and
   limitations under the License.
*/

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

// row is one line of the table: how this project compares with a peer.
type row struct {
	// Section is the row's measurement, What is measured, of which Subject
	// (this project unless said otherwise), and Against which peer.
	Section string `json:"section"`
	What    string `json:"what"`
	Subject string `json:"subject"`
	Against string `json:"against"`
	// Ratio is the subject's figure over the peer's in the same round.
	Ratio summary `json:"ratio"`
	// Added is the difference of the two, where the promise is about it.
	Added *summary `json:"added,omitempty"`
	// Unit is that of Added, Values and Peer: "s", "B", or a thing counted.
	Unit   string `json:"unit"`
	Rounds int    `json:"rounds"`
	// Target is what was promised, and Met whether it is so.
	Target string `json:"target,omitempty"`
	Met    *bool  `json:"met,omitempty"`
	// Values and Peer are the figures that the ratios were made of.
	Values series `json:"values"`
	Peer   series `json:"peer"`
}

// target is a promise about a row.
type target struct {
	text  string
	added bool // the promise is about the difference
	met   func(row) bool
}

// atMost promises a ratio.
func atMost(ratio float64) *target {
	return &target{text: fmt.Sprintf("at most %.4g", ratio), met: func(r row) bool { return r.Ratio.Median <= ratio }}
}

// addsAtMost promises a difference, in the row's unit.
func addsAtMost(text string, v float64) *target {
	return &target{text: "adds at most " + text, added: true, met: func(r row) bool { return r.Added.Median <= v }}
}

// exactly promises the same count in all rounds.
func exactly(n float64, unit string) *target {
	return &target{text: fmt.Sprintf("%.4g %s", n, unit), met: func(r row) bool {
		for _, v := range r.Values {
			if v != n {
				return false
			}
		}
		return true
	}}
}

// equal promises the peer's count in all rounds.
func equal() *target {
	return &target{text: "exactly 1", met: func(r row) bool { return r.Ratio == summary{1, 1, 1} }}
}

// report collects the rows as they are measured.
type report struct {
	Date     time.Time `json:"date"`
	Machine  string    `json:"machine"`
	Versions []string  `json:"versions"`
	Patches  []string  `json:"patches"`
	Short    bool      `json:"short"`
	Rows     []row     `json:"rows"`
	Curves   []curve   `json:"curves"`

	progress io.Writer
	section  string
}

func newReport(progress io.Writer, short bool) *report {
	return &report{Date: time.Now().UTC().Truncate(time.Second), Machine: machine(), Short: short, progress: progress}
}

// machine describes what a ratio may depend on.
func machine() string {
	var u unix.Utsname
	kernel := "unknown kernel"
	if unix.Uname(&u) == nil {
		kernel = "Linux " + unix.ByteSliceToString(u.Release[:])
	}
	return fmt.Sprintf("%s, %s, %d CPUs", kernel, runtime.GOARCH, runtime.NumCPU())
}

func (r *report) about() string {
	return fmt.Sprintf("%s; %s; %d patches", r.Machine, strings.Join(r.Versions, ", "), len(r.Patches))
}

func (r *report) begin(section string) {
	r.section = section
	r.log("%s", section)
}

func (r *report) log(format string, args ...any) {
	fmt.Fprintf(r.progress, "%s  "+format+"\n", append([]any{time.Now().Format("15:04:05")}, args...)...)
}

// compare adds a row. t may be nil.
func (r *report) compare(what, against, unit string, ours, peer series, t *target) {
	r.compareSubject("guest-pull", what, against, unit, ours, peer, t)
}

// compareSubject is compare for a subject that is not this project: a peer's row,
// which shows what the project's own is worth.
func (r *report) compareSubject(subject, what, against, unit string, ours, peer series, t *target) {
	added := summarize(each(minus, ours, peer))
	row := row{
		Section: r.section, What: what, Subject: subject, Against: against, Unit: unit,
		Ratio: summarize(each(over, ours, peer)), Added: &added,
		Rounds: len(ours), Values: ours, Peer: peer,
	}
	if t != nil {
		met := t.met(row)
		row.Target, row.Met = t.text, &met
	}
	if t == nil || !t.added {
		row.Added = nil
	}
	r.Rows = append(r.Rows, row)
}

// ratio formats a number with three significant digits.
func ratio(v float64) string {
	switch {
	case math.Abs(v) >= 100:
		return fmt.Sprintf("%.0f", v)
	case math.Abs(v) >= 10:
		return fmt.Sprintf("%.1f", v)
	case math.Abs(v) < 0.1 && v != 0:
		return fmt.Sprintf("%.1g", v)
	}
	return fmt.Sprintf("%.2f", v)
}

func (s summary) format(f func(float64) string) (median, spread string) {
	return f(s.Median), f(s.Low) + " to " + f(s.High)
}

func inUnit(unit string) func(float64) string {
	return func(v float64) string {
		switch unit {
		case "s":
			return fmt.Sprintf("%+.2f ms", v*1e3)
		case "B":
			return fmt.Sprintf("%+.2f MB", v/1e6)
		}
		return fmt.Sprintf("%+.4g %s", v, unit)
	}
}

func (r row) verdict() string {
	if r.Met == nil {
		return ""
	}
	if *r.Met {
		return r.Target + ": met"
	}
	return r.Target + ": MISSED"
}

func (r row) cells() []string {
	med, spread := r.Ratio.format(ratio)
	what := r.What
	if r.Subject != "guest-pull" {
		what += " (" + r.Subject + ")"
	}
	if r.Added != nil {
		a, s := r.Added.format(inUnit(r.Unit))
		med, spread = med+" ("+a+")", spread+" ("+s+")"
	}
	return []string{what, r.Against, med, spread, fmt.Sprint(r.Rounds), r.verdict()}
}

var header = []string{"what", "against", "ratio", "quartiles", "rounds", "promised"}

// writeTable prints the rows for a terminal.
func (r *report) writeTable(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, r.about())
	section := ""
	fmt.Fprintln(tw, strings.Join(header, "\t"))
	for _, row := range r.Rows {
		if row.Section != section {
			section = row.Section
			fmt.Fprintf(tw, "\n%s\t\t\t\t\t\n", section)
		}
		fmt.Fprintln(tw, "  "+strings.Join(row.cells(), "\t"))
	}
	return tw.Flush()
}

// writeMarkdown is the table for a page.
func (r *report) writeMarkdown(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "# Benchmarks\n\nMade by `make bench` on %s. %s.\n\n",
		r.Date.Format(time.DateOnly), r.about())
	b.WriteString("A ratio is this project's figure over the peer's, both measured in turns in the same\n" +
		"run: below 1 is less time, memory or space than the peer. It is the median of the rounds,\n" +
		"with the quartiles beside it. `results.json` has every figure.\n\n")
	b.WriteString("![Preparing a layer on a node that fills](pictures/growth.svg)\n\n![Pulling over CRI](pictures/pull.svg)\n")
	section := ""
	for _, row := range r.Rows {
		if row.Section != section {
			section = row.Section
			fmt.Fprintf(&b, "\n## %s\n\n| %s |\n|---|---|---|---|---|---|\n", section, strings.Join(header, " | "))
		}
		fmt.Fprintf(&b, "| %s |\n", strings.Join(row.cells(), " | "))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// save writes results.md, results.json and the pictures below a directory.
func (r *report) save(dir string) error {
	if err := os.MkdirAll(filepath.Join(dir, "pictures"), 0o755); err != nil {
		return err
	}
	var md strings.Builder
	if err := r.writeMarkdown(&md); err != nil {
		return err
	}
	text, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "results.json"), append(text, '\n'), 0o644); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "results.md"), []byte(md.String()), 0o644); err != nil {
		return err
	}
	return r.draw(filepath.Join(dir, "pictures"))
}

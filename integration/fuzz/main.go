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

// Command fuzz runs every fuzz target of the main module for a while, and counts
// the inputs that were tried. A failing input is written to the package's testdata
// by the go command, and belongs in the repository together with the fix.
package main

import (
	"bufio"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/guest-pull/guest-pull-snapshotter/integration/figures"
)

func main() {
	each := flag.Duration("time", time.Minute, "how long to run each target")
	dir := flag.String("module", "..", "the directory of the module")
	flag.Parse()
	if err := run(*dir, *each); err != nil {
		fmt.Fprintln(os.Stderr, "fuzz:", err)
		os.Exit(1)
	}
}

type target struct{ pkg, name string }

func run(dir string, each time.Duration) error {
	targets, err := list(dir)
	if err != nil {
		return err
	}
	if len(targets) == 0 {
		return fmt.Errorf("no fuzz target in the module in %s", dir)
	}
	for _, t := range targets {
		n, err := fuzz(dir, t, each)
		if err != nil {
			return fmt.Errorf("%s in %s: %w", t.name, t.pkg, err)
		}
		fmt.Printf("%s in %s: %d inputs, none was too bad\n", t.name, t.pkg, n)
		if err := figures.Add(figures.BadInputs, n); err != nil {
			return err
		}
	}
	return nil
}

// list finds the targets. Listing needs the tests of a package built, so only
// the packages that have fuzz targets in their source are asked.
func list(dir string) ([]target, error) {
	cmd := exec.Command("go", "list", "-f", "{{.ImportPath}}\t{{.Dir}}\t{{join .TestGoFiles \" \"}} {{join .XTestGoFiles \" \"}}", "./...")
	cmd.Dir, cmd.Stderr = dir, os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("list packages: %w", err)
	}
	var targets []target
	for line := range strings.Lines(string(out)) {
		f := strings.Split(strings.TrimSpace(line), "\t")
		if len(f) < 3 {
			continue // no tests
		}
		for file := range strings.FieldsSeq(f[2]) {
			text, err := os.ReadFile(f[1] + "/" + file)
			if err != nil {
				return nil, err
			}
			for _, m := range declared.FindAllSubmatch(text, -1) {
				targets = append(targets, target{f[0], string(m[1])})
			}
		}
	}
	return targets, nil
}

var (
	declared = regexp.MustCompile(`(?m)^func (Fuzz\w+)\(\w+ \*testing\.F\)`)
	executed = regexp.MustCompile(`execs: (\d+)`)

	// timeIsUp is what go test says at times when nothing failed but the time is
	// over (https://go.dev/issue/75804, in Go before 1.27).
	timeIsUp = regexp.MustCompile(`(?m)^--- FAIL: Fuzz\w+ \(\S+\)\n    context deadline exceeded\nFAIL$`)
)

func fuzz(dir string, t target, each time.Duration) (int64, error) {
	cmd := exec.Command("go", "test", "-run=^$", "-fuzz=^"+t.name+"$", "-fuzztime="+each.String(), "-fuzzminimizetime=10x", t.pkg)
	var out bytes.Buffer
	cmd.Dir = dir
	cmd.Stdout = io.MultiWriter(&out, os.Stdout)
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil && !timeIsUp.Match(out.Bytes()) {
		return 0, err
	}
	var n int64
	lines := bufio.NewScanner(&out)
	for lines.Scan() {
		if m := executed.FindStringSubmatch(lines.Text()); m != nil {
			var err error
			if n, err = strconv.ParseInt(m[1], 10, 64); err != nil {
				return 0, err
			}
		}
	}
	if n == 0 {
		return 0, errors.New("no input was tried")
	}
	return n, lines.Err()
}

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
	"bufio"
	"fmt"
	"io"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
)

// result is how a case ended.
type result string

const (
	passed  result = "pass"
	failed  result = "FAIL"
	skipped result = "skip"
	// missing cases are on one side of a comparison only: a parent of theirs
	// failed, or the run was cut short.
	missing result = "missing"
	hung    result = "hung"
)

// results are those of one run, by case: "TestX" or "TestX/sub".
type results map[string]result

var started = regexp.MustCompile(`^=== RUN\s+([^/\s]+)\s*$`)

var verdict = regexp.MustCompile(`^\s*--- (PASS|FAIL|SKIP): (\S+) \(`)

// readResults reads the output of a test binary that ran with -test.v.
func readResults(r io.Reader) (results, error) {
	found := results{}
	// Whatever was started and has no verdict hung until the run was over.
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadString('\n')
		if m := started.FindStringSubmatch(line); m != nil {
			found[m[1]] = hung
		}
		if m := verdict.FindStringSubmatch(line); m != nil {
			found[m[2]] = map[string]result{"PASS": passed, "FAIL": failed, "SKIP": skipped}[m[1]]
		}
		if err == io.EOF {
			// The Go test that critest is fails with each of its cases, and alone
			// only if the suite as a whole went wrong.
			if found[critestTest] == passed || found.count(failed) > 1 {
				delete(found, critestTest)
			}
			return found, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

func (r results) count(of result) (n int) {
	for _, x := range r {
		if x == of {
			n++
		}
	}
	return n
}

// exception is a case that does not pass, and why that is right.
type exception struct {
	suite, name string // name may end in "*"
	reason      string
	used        bool
}

// optional says that the exception is for what a machine lacks, and another has.
func (e *exception) optional() bool { return strings.HasPrefix(e.reason, "machine:") }

// excepted says that a case is in the list.
func excepted(exceptions []*exception, suite, name string) bool {
	return slices.ContainsFunc(exceptions, func(e *exception) bool { return e.matches(suite, name) })
}

// ofLine is how a reason begins that is one for a single line of containerd.
var ofLine = regexp.MustCompile(`^(v\d+\.\d+):$`)

// readExceptions reads the list for a version of containerd: one a line,
// "<suite> <case> <reason>".
func readExceptions(path, version string) ([]*exception, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var list []*exception
	for i, line := range strings.Split(string(text), "\n") {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		f := strings.Fields(line)
		if len(f) < 3 {
			return nil, fmt.Errorf("%s:%d: want a suite, a case and a reason, got %q", path, i+1, line)
		}
		if m := ofLine.FindStringSubmatch(f[2]); m != nil && !strings.HasPrefix(version, m[1]+".") {
			continue
		}
		list = append(list, &exception{suite: f[0], name: f[1], reason: strings.Join(f[2:], " ")})
	}
	return list, nil
}

func (e *exception) matches(suite, name string) bool {
	if prefix, ok := strings.CutSuffix(e.name, "*"); ok {
		return e.suite == suite && strings.HasPrefix(name, prefix)
	}
	// A case's subcases go with it, and a case with its failed subcase.
	return e.suite == suite && (e.name == name || strings.HasPrefix(name, e.name+"/") || strings.HasPrefix(e.name, name+"/"))
}

// judge compares a suite's results on this project's containerd with those on
// the baseline, and with the list of exceptions. It returns what is wrong.
func judge(suite string, ours, baseline results, exceptions []*exception) (problems []string) {
	for _, name := range slices.Sorted(maps.Keys(baseline)) {
		if _, ok := ours[name]; !ok {
			ours[name] = missing
		}
	}
	for _, name := range slices.Sorted(maps.Keys(ours)) {
		got, was := ours[name], baseline[name]
		if got == passed {
			continue
		}
		if baseline != nil && was == passed {
			problems = append(problems, fmt.Sprintf("%s: %s: %s, and passes on stock containerd", suite, name, got))
			continue
		}
		known := false
		for _, e := range exceptions {
			if e.matches(suite, name) {
				e.used, known = true, true
			}
		}
		if !known {
			problems = append(problems, fmt.Sprintf("%s: %s: %s, and is not in the list of exceptions", suite, name, got))
		}
	}
	return problems
}

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

// Package figures collects the numbers that a run of the tests is judged by:
// how often containerd was killed, how many faults were injected. A test adds to
// a figure what it has seen; [Print] shows the sums over all tests of a run.
//
// Figures are kept in the file that the environment variable GUEST_PULL_FIGURES
// names. Without it they are not kept.
package figures

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

// Env names the environment variable with the path of the file.
const Env = "GUEST_PULL_FIGURES"

// Figure is one of the numbers.
type Figure string

// The figures, in the order in which they are printed.
const (
	Kills       Figure = "rounds of kill survived"
	Cuts        Figure = "power cuts survived"
	Faults      Figure = "faults injected"
	BadInputs   Figure = "bad inputs tried"
	Hostile     Figure = "hostile images read"
	Upstream    Figure = "upstream cases passed"
	Critest     Figure = "critest cases passed"
	Kubelets    Figure = "kubelet versions and gates"
	Shapes      Figure = "image shapes tried"
	GuestPulls  Figure = "images pulled by guests"
	LayerBytes  Figure = "layer bytes fetched by the host"
	SecretsSeen Figure = "secrets found in logs, labels, annotations and mounts"
)

var order = []Figure{Kills, Cuts, Faults, BadInputs, Hostile, Upstream, Critest, Kubelets, Shapes, GuestPulls, LayerBytes, SecretsSeen}

// Add adds n to a figure. It is safe for concurrent use, by several processes
// too. An n of 0 says that there was something to count.
func Add(f Figure, n int64) error {
	path := os.Getenv(Env)
	if path == "" {
		return nil
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("keep a figure: %w", err)
	}
	// One write, so that no other comes in between.
	_, err = fmt.Fprintf(file, "%d\t%s\n", n, f)
	return errors.Join(err, file.Close())
}

// Print writes the sums, one a line. Figures to which nothing was added are left
// out. A file that does not exist is an error: nothing was counted then.
func Print(w io.Writer, path string) error {
	file, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("read the figures: %w", err)
	}
	defer file.Close()
	sums := map[Figure]int64{}
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		number, name, _ := strings.Cut(lines.Text(), "\t")
		n, err := strconv.ParseInt(number, 10, 64)
		if err != nil {
			return fmt.Errorf("read the figures in %s: %w", path, err)
		}
		sums[Figure(name)] += n
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("read the figures in %s: %w", path, err)
	}
	for _, f := range order {
		n, ok := sums[f]
		if !ok {
			continue
		}
		delete(sums, f)
		if _, err := fmt.Fprintf(w, "%8d  %s\n", n, f); err != nil {
			return err
		}
	}
	if len(sums) > 0 {
		return fmt.Errorf("figures in %s that nobody knows: %v", path, sums)
	}
	return nil
}

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

// Command patch makes a patched copy of the containerd module of one line, and a
// go.mod to build with it:
//
//	go run ./builder/patch -line 2.4
//	go build -modfile=.build/v2.4/patched/go.mod ./builder/containerd
//
// A line is a minor version of containerd. Its patches are those in
// patches/containerd/common and those in its own directory next to that, in the
// order of their numbers. The version is in the go.mod of its own directory or, if
// there is none, in the main module's.
//
// Run it in the root of the main module. The copy, go.mod and go.sum are left
// alone while neither the patches nor the pinned versions change, so it can be
// called before every build. It needs git, for `git apply`: strict about
// context (never any fuzz), tolerant about line numbers, and it applies a patch
// whole or not at all.
//
// Whatever it prints on standard output was asked for with a flag:
//
//	-try V     a table of how each patch does on any version of the module: whether
//	           it applies, with an offset or not, builds, and whether the tests that
//	           it brings pass. The copy is another one
//	-series    the files of the line's patches, in order, one a line; no copy is made
//	-list      the names of the patches that are in the copy, in order, on one
//	           line, separated by commas
//	-packages  the packages that the patches touch, one a line, as patterns for
//	           `go test` in the copy
//
// It cannot be used with a go.work (the go command refuses -modfile there): set
// GOWORK=off.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "patch:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout io.Writer) error {
	var (
		flags    = flag.NewFlagSet("patch", flag.ContinueOnError)
		b        builder
		list     = flags.Bool("list", false, "print the names of the patches that are in the copy")
		try      = flags.String("try", "", "a version of the module: try the patches on it, one by one, and print how that went")
		series   = flags.Bool("series", false, "print the files of the line's patches, and make no copy")
		packages = flags.Bool("packages", false, "print the packages that the patches touch")
	)
	flags.StringVar(&b.module, "module", "github.com/containerd/containerd/v2", "the module to patch")
	flags.StringVar(&b.line, "line", "", "minor version of the module, such as 2.4 (default: that of go.mod)")
	flags.StringVar(&b.patches, "patches", "patches/containerd", "directory with the directories common and vMAJOR.MINOR of patches")
	flags.StringVar(&b.out, "out", "", "directory to write the copy, go.mod and go.sum to (default .build/vMAJOR.MINOR/patched)")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}

	if *try != "" {
		return b.try(ctx, *try, stdout)
	}
	if *series {
		l, err := b.find(ctx)
		if err != nil {
			return err
		}
		for _, f := range l.patches {
			fmt.Fprintln(stdout, f)
		}
		return nil
	}
	result, err := b.build(ctx)
	if err != nil {
		return err
	}
	if *list {
		fmt.Fprintln(stdout, strings.Join(result.Patches, ","))
	}
	if *packages {
		for _, p := range result.Packages {
			fmt.Fprintln(stdout, p)
		}
	}
	return nil
}

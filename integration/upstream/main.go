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

// Command upstream runs containerd's own integration suites, and critest, which is
// Kubernetes' for container runtimes, against this project's containerd, and against a stock containerd of the same version that
// it builds the same way, and compares.
//
//	go run ./upstream [-suite NAME,...] [-run REGEXP] [-strict]
//	go run ./upstream -build
//	upstream -built ...
//
// The second only builds what the suites need, for a machine that cannot: copied to the
// same places of a source tree there, it is run by the third.
// Containerd's suites come from the module of the version that bin/ is made of. Each run is in a
// sandbox of namespaces, with a registry in it that has images by the names that
// the suites use: no network is needed, and the machine is left as it was.
//
// A case that passes on stock containerd has to pass. One that does not has to be
// in exceptions.txt, with the reason. The results of the last run are kept in
// .build/vMAJOR.MINOR/upstream/results.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/guest-pull/guest-pull-snapshotter/integration/figures"
)

// suite is a test binary and how it is run.
type suite struct {
	name   string
	binary string
	// runtimeHandler is CRI's; snapshotter and runtime are the client's.
	runtimeHandler string
	snapshotter    string
	// critest says that the suite is Kubernetes' own for CRI.
	critest bool
	// compare says that the suite runs on stock containerd too.
	compare bool
	what    string
}

var suites = []suite{
	{name: "cri", binary: "cri-integration.test", compare: true, what: "CRI suite, runc on overlayfs"},
	{name: "client", binary: "client-integration.test", compare: true, what: "client suite, overlayfs"},
	{name: "client-guest-pull", binary: "client-integration.test", snapshotter: "guest-pull", what: "client suite, guest-pull"},
	{name: "cri-guest", binary: "cri-integration.test", runtimeHandler: "guest", what: "CRI suite, stand-in guest on guest-pull"},
	{name: "critest", binary: "critest.test", critest: true, compare: true, what: "critest, runc on overlayfs"},
	{name: "critest-guest", binary: "critest.test", critest: true, runtimeHandler: "guest", what: "critest, stand-in guest on guest-pull"},
}

// tree is where things are.
type tree struct {
	repo    string // the root of the repository
	out     string // .build/vMAJOR.MINOR/upstream
	bin     string // this project's binaries
	version string // of the containerd that they are made of
	last    bool   // the results are there already
}

func main() {
	var err error
	switch os.Getenv(stageEnv) {
	case stageFirst:
		err = first(hosts)
	case stageInside:
		err = inside()
	default:
		// An interrupted run cleans up, too.
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		err = run(ctx)
		stop()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "upstream:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	var (
		only = flag.String("suite", "cri,client,client-guest-pull,cri-guest,critest,critest-guest", "the suites to run, separated by commas")
		expr = flag.String("run", "", "run only the cases that match, as go test's -run")
	)
	last := flag.Bool("last", false, "run nothing, but judge the results of the last run")
	build := flag.Bool("build", false, "only build what is needed")
	built := flag.Bool("built", false, "build nothing: it was, and is there")
	strict := flag.Bool("strict", false, "every case that -run matches has to run and pass, whatever the list of exceptions says")
	flag.Parse()
	if os.Geteuid() != 0 {
		return errors.New("needs root: it runs containers")
	}
	t, err := findTree()
	if err != nil {
		return err
	}
	exceptions, err := readExceptions(filepath.Join(t.repo, "integration", "upstream", "exceptions.txt"), t.version)
	if err != nil {
		return err
	}
	if t.last = *last; !t.last && !*built {
		fmt.Println("building containerd's test suites and a stock containerd")
		if err := t.build(); err != nil {
			return err
		}
	}
	if *build {
		return nil
	}
	for _, hidden := range []string{"/tmp", "/run", "/var/lib", "/opt"} {
		if strings.HasPrefix(t.repo, hidden+"/") {
			return fmt.Errorf("the source tree is in %s, which the sandbox has one of its own of; move it", hidden)
		}
	}
	if *strict {
		exceptions = nil
	}
	var problems, summary []string
	passes, critest := 0, 0
	for _, s := range suites {
		if !slices.Contains(strings.Split(*only, ","), s.name) {
			continue
		}
		var baseline results
		if s.compare && !*strict {
			if baseline, err = t.runSuite(ctx, s, "stock", *expr); err == nil {
				err = t.again(ctx, s, "stock", baseline, func(name string) bool { return baseline[name] == hung })
			}
			if err != nil {
				return err
			}
		}
		ours, err := t.runSuite(ctx, s, "guest-pull", *expr)
		if err == nil {
			err = t.again(ctx, s, "guest-pull", ours, func(name string) bool {
				return ours[name] == hung || ours[name] != passed && (baseline[name] == passed || !excepted(exceptions, s.name, name))
			})
		}
		if err != nil {
			return err
		}
		problems = append(problems, judge(s.name, ours, baseline, exceptions)...)
		line := fmt.Sprintf("%-18s %-42s %4d passed, %3d failed, %3d skipped", s.name, s.what, ours.count(passed), ours.count(failed)+ours.count(missing)+ours.count(hung), ours.count(skipped))
		if baseline != nil {
			line += fmt.Sprintf("; stock: %d, %d, %d", baseline.count(passed), baseline.count(failed), baseline.count(skipped))
		}
		summary = append(summary, line)
		passes += ours.count(passed)
		if s.critest {
			critest += ours.count(passed)
		}
	}
	if err := errors.Join(figures.Add(figures.Upstream, int64(passes-critest)), figures.Add(figures.Critest, int64(critest))); err != nil {
		return err
	}
	fmt.Println(strings.Join(summary, "\n"))
	if *expr == "" {
		for _, e := range exceptions {
			if !e.used && !e.optional() && slices.Contains(strings.Split(*only, ","), e.suite) {
				problems = append(problems, fmt.Sprintf("%s: %s: is in the list of exceptions and passes now", e.suite, e.name))
			}
		}
	}
	if len(problems) > 0 {
		return fmt.Errorf("%d problems; logs are in %s:\n%s", len(problems), filepath.Join(t.out, "results"), strings.Join(problems, "\n"))
	}
	fmt.Println("nothing that passes on stock containerd fails here; whatever else does not pass is in exceptions.txt")
	return nil
}

// again runs cases once more, alone: some of the suites' cases depend on time, and
// fail or hang on a machine that has much to do.
func (t tree) again(ctx context.Context, s suite, which string, all results, needed func(string) bool) error {
	var names []string
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if !strings.Contains(name, "/") && needed(name) {
			names = append(names, name)
		}
	}
	for _, name := range names {
		fmt.Printf("%s on %s: %s: %s; once more, alone\n", s.name, which, name, all[name])
		again, err := t.runSuite(ctx, s, which+".again", "^"+regexp.QuoteMeta(name)+"$")
		if err != nil {
			return err
		}
		maps.Copy(all, again)
	}
	return nil
}

func findTree() (tree, error) {
	dir, err := os.Getwd()
	if err != nil {
		return tree{}, err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "integration", "go.mod")); err == nil {
			break
		}
		if dir == "/" {
			return tree{}, errors.New("run it inside the source tree")
		}
		dir = filepath.Dir(dir)
	}
	t := tree{repo: dir, bin: os.Getenv("GUEST_PULL_CONTAINERD")}
	if t.bin == "" {
		t.bin = filepath.Join(dir, "bin")
	}
	if t.bin, err = filepath.Abs(t.bin); err != nil {
		return tree{}, err
	}
	if _, err := os.Stat(filepath.Join(t.bin, "containerd")); err != nil {
		return tree{}, fmt.Errorf("%w; run `make build`, or let GUEST_PULL_CONTAINERD name the directory of a containerd", err)
	}
	// v2.4.2+guest-pull.0.1.0: the suites, and what is compared with, are of v2.4.2.
	out, err := exec.Command(filepath.Join(t.bin, "containerd"), "--version").Output()
	if err != nil {
		return tree{}, fmt.Errorf("ask the containerd in %s for its version: %w", t.bin, err)
	}
	m := regexp.MustCompile(` ((v[0-9]+\.[0-9]+)\.[^ +]+)`).FindStringSubmatch(string(out))
	if m == nil {
		return tree{}, fmt.Errorf("the containerd in %s names no version: %q", t.bin, out)
	}
	t.version, t.out = m[1], filepath.Join(dir, ".build", m[2], "upstream")
	return t, nil
}

const (
	containerdModule = "github.com/containerd/containerd/v2"
	// criTools is where critest is. Its version is that of the kubelet in
	// ../kubernetes.
	criTools = "sigs.k8s.io/cri-tools@v1.37.0"
)

// build builds the suites, their tools and a stock containerd, all from a copy
// of the containerd module. What is built already is built again in no time.
func (t tree) build() error {
	version := t.version
	out, err := exec.Command("go", "mod", "download", "-json", containerdModule+"@"+version).Output()
	if err != nil {
		return fmt.Errorf("find the containerd module of version %s: %w", version, err)
	}
	var found struct{ Dir string }
	if err := json.Unmarshal(out, &found); err != nil {
		return fmt.Errorf("read the output of go mod download: %w", err)
	}
	module := found.Dir
	source := filepath.Join(t.out, "containerd-"+version)
	if _, err := os.Stat(source); err != nil {
		unfinished := source + ".tmp"
		if err := errors.Join(os.MkdirAll(t.out, 0o755), os.RemoveAll(unfinished)); err != nil {
			return err
		}
		if err := os.CopyFS(unfinished, os.DirFS(module)); err != nil {
			return fmt.Errorf("copy the containerd module: %w", err)
		}
		if err := os.Rename(unfinished, source); err != nil {
			return err
		}
	}
	tags := "netgo osusergo static_build urfave_cli_no_docs"
	ldflags := "-s -w -X " + containerdModule + "/version.Version=" + version
	for _, args := range [][]string{
		{"test", "-c", "-o", "../cri-integration.test", "./integration"},
		{"test", "-c", "-o", "../client-integration.test", "./integration/client"},
		{"build", "-o", "../tools/", "./integration/failpoint/cmd/cni-bridge-fp", "./integration/failpoint/cmd/containerd-shim-runc-fp-v1", "./integration/failpoint/cmd/loopback-v2", "./integration/failpoint/cmd/runc-fp"},
		{"build", "-trimpath", "-buildvcs=false", "-ldflags", ldflags, "-tags", tags, "-o", "../stock/", "./cmd/containerd", "./cmd/ctr"},
		{"build", "-trimpath", "-buildvcs=false", "-ldflags", ldflags, "-tags", tags + " no_grpc", "-o", "../stock/", "./cmd/containerd-shim-runc-v2"},
	} {
		if err := os.MkdirAll(filepath.Join(t.out, "tools"), 0o755); err != nil {
			return err
		}
		cmd := exec.Command("go", args...)
		cmd.Dir = source
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-mod=mod", "GOWORK=off")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
		}
	}
	return t.buildCritest()
}

func (t tree) buildCritest() error {
	out, err := exec.Command("go", "mod", "download", "-json", criTools).Output()
	if err != nil {
		return fmt.Errorf("go mod download %s: %w: %s", criTools, err, out)
	}
	var module struct{ Dir string }
	if err := json.Unmarshal(out, &module); err != nil {
		return err
	}
	for dir, args := range map[string][]string{
		module.Dir:                           {"test", "-c", "-trimpath", "-o", filepath.Join(t.out, "critest.test"), "./cmd/critest"},
		filepath.Join(t.repo, "integration"): {"build", "-trimpath", "-buildvcs=false", "-o", filepath.Join(t.out, "tools", "nonewprivs"), "./upstream/nonewprivs"},
	} {
		cmd := exec.Command("go", args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
		}
	}
	return nil
}

// runSuite runs a suite against the stock containerd or this project's.
func (t tree) runSuite(ctx context.Context, s suite, which, expr string) (results, error) {
	bin := t.bin
	if strings.HasPrefix(which, "stock") {
		bin = filepath.Join(t.out, "stock")
	}
	dir := filepath.Join(t.out, "results")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	file := filepath.Join(dir, s.name+"."+which+".log")
	if expr != "" {
		file = filepath.Join(dir, s.name+"."+which+".some.log") // the results of the whole stay
	}
	if t.last {
		log, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		defer log.Close()
		return readResults(log)
	}
	log, err := os.Create(file)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	// On disk, as overlayfs needs it.
	scratch, err := os.MkdirTemp(t.out, "sandbox-")
	if err != nil {
		return nil, err
	}
	fmt.Printf("%s on %s; log: %s\n", s.name, which, log.Name())
	started := time.Now()
	err = sandboxed(ctx, scratch, []string{s.name, bin, t.out, filepath.Join(t.repo, ".build"), expr}, log)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return nil, err
	}
	if _, err := log.Seek(0, 0); err != nil {
		return nil, err
	}
	found, err := readResults(log)
	if err != nil {
		return nil, err
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("%s on %s ran no case; look into %s", s.name, which, log.Name())
	}
	fmt.Printf("%s on %s: %d passed, %d failed, %d skipped, %s\n", s.name, which,
		found.count(passed), found.count(failed), found.count(skipped), time.Since(started).Round(time.Second))
	return found, nil
}

// keepalive runs containerd, again and again, until the context is done. The
// cases that end it expect it to be back.
func keepalive(ctx context.Context, name string, args []string, env []string, log *os.File) {
	for ctx.Err() == nil {
		cmd := exec.CommandContext(ctx, name, args...)
		cmd.Env = env
		cmd.Stdout, cmd.Stderr = log, log
		if err := cmd.Run(); err != nil && ctx.Err() == nil {
			fmt.Fprintln(log, "containerd ended:", err)
		}
		time.Sleep(time.Second)
	}
}

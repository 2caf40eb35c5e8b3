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
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"
	"github.com/urfave/cli/v3"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/guest-pull/guest-pull-snapshotter/builder/check"
	"github.com/guest-pull/guest-pull-snapshotter/builder/enable"
	"github.com/guest-pull/guest-pull-snapshotter/builder/status"
)

func init() {
	guestPullCommand.Commands = append(guestPullCommand.Commands, enableCommand, disableCommand)
}

var changeFlags = []cli.Flag{
	&cli.BoolFlag{Name: "dry-run", Usage: "Show what would change, and change nothing"},
	&cli.BoolFlag{Name: "restart", Usage: "Restart containerd, so that the change takes effect"},
	&cli.BoolFlag{Name: "force", Usage: "Go on in spite of what is found"},
}

var enableCommand = &cli.Command{
	Name:      "enable",
	Usage:     "Have the images of runtime handlers pulled in the guest",
	ArgsUsage: "HANDLER...",
	Description: `Writes a drop-in, conf.d/` + enable.DropIn + ` beside the configuration,
that maps these handlers to the snapshotter. No other file is changed; a
config.toml is made where there is none. The result is loaded and checked before
anything is written, and an error that would break a pod ends it (--force).

A handler that the node does not have is made when --runtime-type is given.
Nothing is restarted without --restart.`,
	Flags: append([]cli.Flag{
		&cli.StringFlag{Name: "runtime-type", Usage: "Make handlers that do not exist, with this `TYPE` (io.containerd.kata.v2)"},
		&cli.StringFlag{Name: "kata-config", Usage: "Kata's configuration `FILE` for handlers that are made"},
		&cli.BoolFlag{Name: "import", Usage: "Change the imports of config.toml if it does not import conf.d"},
	}, changeFlags...),
	Action: func(ctx context.Context, cmd *cli.Command) error {
		if err := quiet(); err != nil {
			return err
		}
		n := node(ctx, cmd)
		n.Import = cmd.Bool("import")
		how := enable.Handler{RuntimeType: cmd.String("runtime-type"), KataConfig: cmd.String("kata-config")}
		if how.KataConfig != "" {
			// A shim reads it in a directory of its own.
			var err error
			if how.KataConfig, err = filepath.Abs(how.KataConfig); err != nil {
				return err
			}
		}
		unlock, err := n.Lock()
		if err != nil {
			return err
		}
		defer unlock()
		change, err := n.Enable(cmd.Args().Slice(), how)
		if err != nil {
			return err
		}
		w := cmd.Root().Writer
		for _, name := range change.Already {
			fmt.Fprintf(w, "%s: on already, by another file than %s\n", name, enable.DropIn)
		}
		if len(change.Files) == 0 {
			fmt.Fprintln(w, "nothing to change")
			return nil
		}
		writeChange(w, change)
		in := checkInput(ctx, cmd)
		in.Config, in.ConfigErr = change.After, nil
		report := check.Run(ctx, in)
		if err := report.WriteTable(w); err != nil {
			return err
		}
		if !report.OK() && !cmd.Bool("force") {
			return errors.New("nothing was changed: with this configuration pods would fail, as the errors above say (--force ignores them)")
		}
		return apply(ctx, cmd, change)
	},
}

var disableCommand = &cli.Command{
	Name:      "disable",
	Usage:     "Take back what enable did, for these runtime handlers or for all",
	ArgsUsage: "[HANDLER...]",
	Description: `Takes the handlers out of conf.d/` + enable.DropIn + `, and removes that file
when none is left. Pods of these handlers have to go first: they are named, and
nothing is changed while there are some (--force). Images that only guests have are
named, too: pods of other handlers pull them again.`,
	Flags: changeFlags,
	Action: func(ctx context.Context, cmd *cli.Command) error {
		if err := quiet(); err != nil {
			return err
		}
		n := node(ctx, cmd)
		unlock, err := n.Lock()
		if err != nil {
			return err
		}
		defer unlock()
		change, err := n.Disable(cmd.Args().Slice())
		if err != nil {
			return err
		}
		w := cmd.Root().Writer
		if len(change.Files) == 0 {
			fmt.Fprintln(w, "nothing to change")
			return nil
		}
		writeChange(w, change)
		handlers := change.Handlers
		if b := change.Before; b != nil && slices.Contains(handlers, b.Plugins.Runtime.Containerd.DefaultRuntimeName) {
			handlers = append(slices.Clone(handlers), "") // as CRI says of pods without a RuntimeClass
		}
		pods, err := inTheWay(ctx, w, daemonAddress(cmd, change.Before), handlers)
		if err != nil {
			return err
		}
		if pods > 0 && !cmd.Bool("force") {
			return fmt.Errorf("nothing was changed: remove these %d pods first (drain the node, or crictl rmp -f), or leave them as they are (--force): "+
				"their containers run on, and cannot be started again", pods)
		}
		return apply(ctx, cmd, change)
	},
}

func node(ctx context.Context, cmd *cli.Command) enable.Node {
	return enable.Node{
		Config: cmd.String("config"),
		Load:   func(path string) (*check.Config, error) { return loadEffective(ctx, cmd, path) },
	}
}

// writeChange shows a change: files line by line, and handlers.
func writeChange(w io.Writer, change enable.Change) {
	for _, f := range change.Files {
		what := "changed"
		switch {
		case f.Old == nil:
			what = "new"
		case f.New == nil:
			what = "removed"
		}
		fmt.Fprintf(w, "%s (%s)\n", f.Path, what)
		before, after := lines(f.Old), lines(f.New)
		for len(before) > 0 && len(after) > 0 && before[0] == after[0] {
			before, after = before[1:], after[1:]
		}
		for len(before) > 0 && len(after) > 0 && before[len(before)-1] == after[len(after)-1] {
			before, after = before[:len(before)-1], after[:len(after)-1]
		}
		for _, l := range before {
			fmt.Fprintf(w, "  - %s\n", l)
		}
		for _, l := range after {
			fmt.Fprintf(w, "  + %s\n", l)
		}
	}
	for _, name := range change.Handlers {
		fmt.Fprintf(w, "handler %s: snapshotter %s -> %s\n", name, snapshotterOf(change.Before, name), snapshotterOf(change.After, name))
	}
	fmt.Fprintln(w)
}

func lines(text []byte) []string {
	if len(text) == 0 {
		return nil
	}
	return strings.Split(string(bytes.TrimSuffix(text, []byte("\n"))), "\n")
}

func snapshotterOf(c *check.Config, handler string) string {
	if c != nil {
		if r, ok := c.Plugins.Runtime.Containerd.Runtimes[handler]; ok {
			return c.EffectiveSnapshotter(r)
		}
	}
	return "(no such handler)"
}

func apply(ctx context.Context, cmd *cli.Command, change enable.Change) error {
	w := cmd.Root().Writer
	if cmd.Bool("dry-run") {
		fmt.Fprintln(w, "dry run: nothing was changed")
		return nil
	}
	if err := change.Apply(); err != nil {
		return err
	}
	daemon, _ := askDaemon(ctx, daemonAddress(cmd, change.After))
	unit := unitOf(daemon.Pid)
	if !cmd.Bool("restart") {
		fmt.Fprintf(w, "written; it takes effect when containerd is restarted: systemctl restart %s\n", unit)
		return nil
	}
	out, err := exec.CommandContext(ctx, "systemctl", "restart", unit).CombinedOutput()
	if err != nil {
		return fmt.Errorf("the files are written, but %s was not restarted: %w: %s", unit, err, bytes.TrimSpace(out))
	}
	// A unit need not tell when it is ready.
	for deadline := time.Now().Add(askTimeout); ; time.Sleep(100 * time.Millisecond) {
		if daemon, _ = askDaemon(ctx, daemonAddress(cmd, change.After)); daemon.Err == nil && daemon.HasPlugin && daemon.PluginErr == "" && daemon.HasCRI && daemon.CRIErr == "" {
			fmt.Fprintf(w, "written, and %s was restarted\n", unit)
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the files are written, and %s was restarted, but does not serve CRI with the snapshotter: see containerd guest-pull check", unit)
		}
	}
}

// unitOf is the systemd unit of a process, by its cgroup.
func unitOf(pid uint64) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err == nil && pid != 0 {
		for line := range strings.Lines(string(b)) {
			for _, name := range slices.Backward(strings.Split(strings.TrimSpace(line), "/")) {
				if strings.HasSuffix(name, ".service") {
					return name
				}
			}
		}
	}
	return "containerd.service"
}

// inTheWay names the pods of these handlers, and the images that only guests have,
// and returns the number of pods. A containerd that does not run has no pods that
// could be asked for, and says so.
func inTheWay(ctx context.Context, w io.Writer, address string, handlers []string) (int, error) {
	if _, err := os.Stat(address); err != nil {
		fmt.Fprintf(w, "containerd does not run (%v): its pods and images are not known\n\n", err)
		return 0, nil
	}
	client, err := connect(address)
	if err != nil {
		return 0, err
	}
	defer client.Close() //nolint:errcheck // it only read
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	pods, err := podsOf(ctx, client, handlers)
	if err != nil {
		return 0, fmt.Errorf("ask containerd at %s for its pods: %w", filepath.Clean(address), err)
	}
	for _, p := range pods {
		fmt.Fprintf(w, "pod %s/%s of handler %s is on this node (%s)\n", p.GetMetadata().GetNamespace(), p.GetMetadata().GetName(),
			cmp.Or(p.GetRuntimeHandler(), "(default)"), p.GetId())
	}
	s, err := status.Collect(ctx, client)
	if err != nil {
		return 0, fmt.Errorf("ask containerd at %s for its images: %w", address, err)
	}
	for _, i := range s.Images {
		if i.GuestOnly {
			fmt.Fprintf(w, "image %s has layers that are in guests only: it is pulled again for other pods, or remove it: crictl rmi %s\n", i.Name, i.Name)
		}
	}
	return len(pods), nil
}

func podsOf(ctx context.Context, client *containerd.Client, handlers []string) ([]*runtimeapi.PodSandbox, error) {
	conn, ok := client.Conn().(grpc.ClientConnInterface)
	if !ok {
		return nil, fmt.Errorf("a connection of type %T: %w", client.Conn(), errdefs.ErrNotImplemented)
	}
	r, err := runtimeapi.NewRuntimeServiceClient(conn).ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(r.GetItems(), func(p *runtimeapi.PodSandbox) bool {
		return !slices.Contains(handlers, p.GetRuntimeHandler())
	}), nil
}

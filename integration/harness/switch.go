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

package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
)

// Reconfigure changes the options of a node that is down: its binaries, and its
// configuration, which is written anew. What is on its disk and the containers
// that run stay, so that the next Up is that of another containerd on the same
// node.
func (n *Node) Reconfigure(ctx context.Context, change func(*Options)) error {
	if n.process != nil {
		return errors.New("reconfigure a node: containerd is running")
	}
	o := n.opts
	change(&o)
	bin, err := findBinaries(o)
	if err != nil {
		return err
	}
	if err := writeConfig(n.paths, bin, o); err != nil {
		return err
	}
	patches, err := bin.patches(ctx)
	if err != nil {
		return err
	}
	n.opts, n.bin, n.patches = o, bin, patches
	return nil
}

// Containerd runs a subcommand of the node's containerd, such as "guest-pull
// status", with the node's configuration and address, and returns what it printed
// on its standard output.
func (n *Node) Containerd(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(n.bin.dir, "containerd"),
		append([]string{"--config", n.config(), "--address", n.socket()}, args...)...)
	cmd.Env = n.env()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("containerd %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

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
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
	"github.com/guest-pull/guest-pull-snapshotter/integration/shim-guest/guest"
)

// The runtime handlers that every node has.
const (
	// Runc runs containers on the host.
	Runc = "runc"
	// Guest runs them in a guest, on the guest-pull snapshotter.
	Guest = "guest"
)

const (
	// Snapshotter is the name of the snapshotter under test.
	Snapshotter = "guest-pull"
	// StandIn is the runtime type of the stand-in guest.
	StandIn = "io.containerd.guest.v2"

	standInBinary = "containerd-shim-guest-v2"
)

// SandboxerShim is the value of Options.Sandboxer for sandboxes that the shim makes.
const SandboxerShim = "shim"

// Options says what is special about a node. The zero value is a node with
// containerd's default configuration, but for paths.
type Options struct {
	// Registry is a registry whose certificate the node and the guest trust,
	// and where the node's pause image comes from. Optional.
	Registry *registry.Registry
	// PauseImage is the reference of the image for sandboxes; "" means
	// "pause:1" of Registry, where Start then puts one, or containerd's own
	// default when there is no Registry.
	PauseImage string

	// GuestSnapshotter is the snapshotter of the handler Guest; "" means
	// Snapshotter. Comparisons name another one.
	GuestSnapshotter string
	// Sandboxer says who makes the sandboxes of the handler Guest: "shim" is the
	// shim, by containerd's sandbox API; "podsandbox" is containerd, as a container
	// of the pause image; "" means what GUEST_SANDBOXER says, or podsandbox. The
	// stand-in guest serves the sandbox API as Kata's Rust shim does, so with "shim"
	// Guest.Flavour is FlavourRust. Kata's makes no such sandbox on the host's
	// network, so with "shim" the guest pods get an empty network of their own.
	Sandboxer string
	// DisablePauseImagePull sets disable_pause_image_pull for the handler Guest.
	DisablePauseImagePull bool
	// LocalPull sets use_local_image_pull: containerd's CRI pulls by itself
	// instead of through the transfer service.
	LocalPull bool
	// DiscardUnpackedLayers sets discard_unpacked_layers.
	DiscardUnpackedLayers bool
	// PluginConfig is the configuration of the snapshotter under test: TOML
	// keys, as in its section of config.toml.
	PluginConfig string
	// ExtraConfig is TOML that is merged over the rest of config.toml.
	ExtraConfig string

	// Guest is the configuration of the stand-in guest. RecordDir and CAFile
	// are set for it.
	Guest guest.Config

	// PullHint says how pulls name the runtime handler; see [Hint].
	PullHint Hint

	// Binaries is the directory of containerd, ctr and the shims; "" means
	// what GUEST_PULL_CONTAINERD says, or bin/ of the repository.
	Binaries string
	// Env is added to containerd's environment.
	Env []string
}

// paths are the places of a node, all below its directory. They are short:
// sockets have no more than 108 bytes for theirs.
type paths struct {
	dir string
}

func (p paths) join(elem ...string) string { return filepath.Join(append([]string{p.dir}, elem...)...) }

func (p paths) root() string      { return p.join("root") }
func (p paths) state() string     { return p.join("state") }
func (p paths) socket() string    { return p.join("c.sock") }
func (p paths) shims() string     { return p.join("s") }
func (p paths) runc() string      { return p.join("runc") }
func (p paths) logs() string      { return p.join("pods") }
func (p paths) records() string   { return p.join("records") }
func (p paths) hosts() string     { return p.join("certs.d") }
func (p paths) config() string    { return p.join("config.toml") }
func (p paths) guestConf() string { return p.join("guest.json") }
func (p paths) ca() string        { return p.join("ca.pem") }
func (p paths) log() string       { return p.join("containerd.log") }

// binaries is what a node runs.
type binaries struct {
	dir         string // containerd, ctr, containerd-shim-runc-v2
	runtimeType string // of the handler Guest
	shim        string // of the handler Guest; "" lets containerd find it
}

// Binaries returns the directory of the containerd that nodes run by default:
// what GUEST_PULL_CONTAINERD says, or bin/ of the repository.
func Binaries() (string, error) {
	b, err := findBinaries(Options{})
	return b.dir, err
}

// Peer returns the directory of a containerd that the one under test is compared
// with, of the same minor version, as `make bench-binaries` builds them: "stock", or
// "unpatched", which has the plugin and no patches.
func Peer(name string) (string, error) {
	line, repo, err := ownLine()
	if err != nil {
		return "", err
	}
	return filepath.Join(repo, ".build", line, "bench", name), nil
}

// OtherLines returns the directories of what `make other-lines` builds: this
// project's containerd of other minor versions than the one under test.
func OtherLines() ([]string, error) {
	line, repo, err := ownLine()
	if err != nil {
		return nil, err
	}
	found, err := filepath.Glob(filepath.Join(repo, ".build", "v*", "bin", "containerd"))
	if err != nil {
		return nil, err
	}
	var others []string
	for _, program := range found {
		dir := filepath.Dir(program)
		if filepath.Base(filepath.Dir(dir)) != line {
			others = append(others, dir)
		}
	}
	return others, nil
}

// ownLine returns the minor version of the containerd under test, such as "v2.4",
// and the root of the source tree.
func ownLine() (line, repo string, err error) {
	dir, err := Binaries()
	if err != nil {
		return "", "", err
	}
	if repo, err = repository(); err != nil {
		return "", "", err
	}
	program := filepath.Join(dir, "containerd")
	out, err := exec.Command(program, "--version").Output()
	if err != nil {
		return "", "", fmt.Errorf("ask %s for its version: %w", program, err)
	}
	if line = regexp.MustCompile(` v[0-9]+\.[0-9]+`).FindString(string(out)); line == "" {
		return "", "", fmt.Errorf("%s --version names no version: %q", program, out)
	}
	return line[1:], repo, nil
}

func findBinaries(o Options) (binaries, error) {
	b := binaries{dir: o.Binaries, runtimeType: os.Getenv("RUNTIME")}
	repo, repoErr := repository()
	installed := true
	if b.dir == "" {
		b.dir = os.Getenv("GUEST_PULL_CONTAINERD")
	}
	if b.dir == "" {
		if repoErr != nil {
			return b, repoErr
		}
		installed = false
		b.dir = filepath.Join(repo, "bin")
	}
	var err error
	if b.dir, err = filepath.Abs(b.dir); err != nil {
		return b, err
	}

	remedy := "run `make build`"
	if installed {
		remedy = "GUEST_PULL_CONTAINERD has to name the directory of an installed containerd"
	}
	if err := exist(remedy,
		filepath.Join(b.dir, "containerd"),
		filepath.Join(b.dir, "ctr"),
		filepath.Join(b.dir, "containerd-shim-runc-v2"),
	); err != nil {
		return b, err
	}
	if b.runtimeType == "" || b.runtimeType == StandIn {
		b.runtimeType = StandIn
		if repoErr != nil {
			return b, repoErr
		}
		b.shim = filepath.Join(repo, ".build", standInBinary)
		return b, exist("run `make test-tools`", b.shim)
	}
	return b, nil
}

// patches asks the containerd binary. Stock containerd does not know the question
// and has none.
func (b binaries) patches(ctx context.Context) ([]string, error) {
	var exit *exec.ExitError
	out, err := exec.CommandContext(ctx, filepath.Join(b.dir, "containerd"), "guest-pull", "version").Output()
	if errors.As(err, &exit) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("ask containerd for its patches: %w", err)
	}
	_, list, _ := strings.Cut(string(out), "\npatches:\n")
	return strings.Fields(list), nil
}

func exist(remedy string, files ...string) error {
	var missing []string
	for _, f := range files {
		if _, err := os.Stat(f); err != nil {
			missing = append(missing, f)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("not found: %s; %s", strings.Join(missing, ", "), remedy)
	}
	return nil
}

// repository finds the root of the source tree from the working directory,
// which for a test is the directory of its package.
func repository() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for d := dir; ; d = filepath.Dir(d) {
		if _, err := os.Stat(filepath.Join(d, "integration", "go.mod")); err == nil {
			return d, nil
		}
		if d == filepath.Dir(d) {
			return "", fmt.Errorf("%s is not inside the source tree of guest-pull-snapshotter; "+
				"run from there, and let GUEST_PULL_CONTAINERD and RUNTIME name what to test", dir)
		}
	}
}

type table = map[string]any

// writeConfig writes everything that containerd and the guest read.
func writeConfig(p paths, b binaries, o Options) error {
	images := table{
		"use_local_image_pull":    o.LocalPull,
		"discard_unpacked_layers": o.DiscardUnpackedLayers,
		"registry":                table{"config_path": p.hosts()},
	}
	if o.PauseImage != "" {
		images["pinned_images"] = table{"sandbox": o.PauseImage}
	}
	snapshotter := o.GuestSnapshotter
	if snapshotter == "" {
		snapshotter = Snapshotter
	}
	guestHandler := table{"runtime_type": b.runtimeType, "snapshotter": snapshotter}
	if b.shim != "" {
		guestHandler["runtime_path"] = b.shim
	}
	if o.Sandboxer != "" {
		guestHandler["sandboxer"] = o.Sandboxer
	}
	if o.DisablePauseImagePull {
		guestHandler["disable_pause_image_pull"] = true
	}

	conf := table{
		"version": 4,
		"root":    p.root(),
		"state":   p.state(),
		"temp":    p.join("tmp"),
		"imports": []string{},
		"debug":   table{"level": "debug"},
		"plugins": table{
			"io.containerd.server.v1.grpc":  table{"address": p.socket()},
			"io.containerd.server.v1.ttrpc": table{"address": p.socket() + ".ttrpc"},
			// These would otherwise be shared with the system's containerd.
			"io.containerd.shim.v1.manager":           table{"socket_dir": p.shims()},
			"io.containerd.nri.v1.nri":                table{"disable": true},
			"io.containerd.internal.v1.opt":           table{"path": p.join("opt")},
			"io.containerd.image-verifier.v1.bindir":  table{"bin_dir": p.join("verifiers")},
			"io.containerd.transfer.v1.local":         table{"config_path": p.hosts()},
			"io.containerd.snapshotter.v1.guest-pull": table{},
			"io.containerd.cri.v1.images":             images,
			"io.containerd.cri.v1.runtime": table{
				"cdi_spec_dirs":                []string{},
				"restrict_oom_score_adj":       true,
				"netns_mounts_under_state_dir": true,
				"cni":                          table{"bin_dirs": []string{p.join("cni")}, "conf_dir": p.join("cni")},
				"containerd": table{
					"default_runtime_name": Runc,
					"runtimes": table{
						Runc: table{
							"runtime_type": "io.containerd.runc.v2",
							"runtime_path": filepath.Join(b.dir, "containerd-shim-runc-v2"),
							"options":      table{"Root": p.runc()},
						},
						Guest: guestHandler,
					},
				},
			},
		},
	}
	for what, text := range map[string]string{
		"Options.PluginConfig": "[plugins.'io.containerd.snapshotter.v1.guest-pull']\n" + o.PluginConfig,
		"Options.ExtraConfig":  o.ExtraConfig,
	} {
		var extra table
		if err := toml.Unmarshal([]byte(text), &extra); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		merge(conf, extra)
	}
	text, err := toml.Marshal(conf)
	if err != nil {
		return err
	}

	guestConf := o.Guest
	guestConf.RecordDir = p.records()
	guestConf.RuncRoot = p.runc()
	if o.Sandboxer == SandboxerShim {
		guestConf.Flavour = guest.FlavourRust
	}
	var errs []error
	write := func(path string, data []byte) {
		errs = append(errs, os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, data, 0o600))
	}
	write(p.config(), text)
	if o.Sandboxer == SandboxerShim {
		write(p.join("cni", "10-none.conflist"), []byte(noNetwork))
		for _, name := range []string{"none", "loopback"} {
			write(p.join("cni", name), []byte(noNetworkPlugin))
			errs = append(errs, os.Chmod(p.join("cni", name), 0o755))
		}
	}
	if o.Registry != nil {
		if err := trust(p, o.Registry, &guestConf, write); err != nil {
			return err
		}
	}
	guestText, err := json.MarshalIndent(guestConf, "", "  ")
	if err != nil {
		return err
	}
	write(p.guestConf(), guestText)
	return errors.Join(errs...)
}

// A CNI plugin that leaves a pod's network namespace as it is, empty, and says
// otherwise: CRI wants an address.
const (
	noNetwork       = `{"cniVersion": "1.0.0", "name": "empty", "plugins": [{"type": "none"}]}`
	noNetworkPlugin = `#!/bin/sh
case $CNI_COMMAND in
ADD) echo '{"cniVersion": "1.0.0", "interfaces": [{"name": "'"$CNI_IFNAME"'", "sandbox": "'"$CNI_NETNS"'"}], "ips": [{"address": "192.0.2.1/32", "interface": 0}]}' ;;
VERSION) echo '{"cniVersion": "1.0.0", "supportedVersions": ["0.3.1", "0.4.0", "1.0.0"]}' ;;
esac
`
)

// trust makes containerd and the guest talk to a registry that they would not
// talk to by default. A registry on loopback without TLS needs nothing.
func trust(p paths, r *registry.Registry, g *guest.Config, write func(string, []byte)) error {
	u, err := url.Parse(r.URL())
	if err != nil {
		return err
	}
	hosts := fmt.Sprintf("server = %q\n[host.%q]\n", u, u)
	switch {
	case r.CA() != nil:
		write(p.ca(), r.CA())
		g.CAFile = p.ca()
		hosts += fmt.Sprintf("  ca = %q\n", p.ca())
	case net.ParseIP(u.Hostname()).IsLoopback():
		return nil
	default:
		g.Registries = maps.Clone(g.Registries)
		if g.Registries == nil {
			g.Registries = map[string]guest.Registry{}
		}
		conf := g.Registries[u.Host]
		conf.PlainHTTP = true
		g.Registries[u.Host] = conf
	}
	write(filepath.Join(p.hosts(), u.Host, "hosts.toml"), []byte(hosts))
	return nil
}

// merge puts from over into, table by table.
func merge(into, from table) {
	for k, v := range from {
		sub, ok := v.(table)
		old, was := into[k].(table)
		if ok && was {
			merge(old, sub)
			continue
		}
		into[k] = v
	}
}

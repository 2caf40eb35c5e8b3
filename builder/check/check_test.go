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

package check

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const (
	goShim   = "kata-runtime containerd shim (Golang): id: \"io.containerd.kata.v2\", version: %s, commit: abc\n"
	rustShim = "Kata Containers containerd shim (Rust): id: io.containerd.kata.v2, version: %s, commit: abc\n"

	shimFile  = "/usr/local/bin/containerd-shim-kata-qemu-coco-dev-v2"
	mainFile  = "/etc/containerd/config.toml"
	kataFile  = "/etc/kata-containers/configuration.toml"
	rustFile  = "/etc/kata-containers/runtime-rs/configuration.toml"
	rootDir   = "/var/lib/containerd/io.containerd.snapshotter.v1.guest-pull"
	kataFine  = "[hypervisor.qemu]\nshared_fs = \"none\"\n[runtime]\ncreate_container_timeout = 600\n"
	rustFine  = "[hypervisor.qemu]\nshared_fs = \"none\"\n[agent.kata]\ncreate_container_timeout = 600\n[runtime]\nhypervisor_name = \"qemu\"\n"
	kubeletOK = "kind: KubeletConfiguration\nruntimeRequestTimeout: 10m0s\n"
)

// node is a host on which everything is in order, to be spoilt.
type node struct {
	t      *testing.T
	in     Input
	config string
	shims  map[string]string // what programs print for --version
}

func newNode(t *testing.T) *node {
	t.Helper()
	n := &node{t: t, shims: map[string]string{shimFile: fmt.Sprintf(goShim, "4.1.0")}}
	n.in.Host = Host{
		Root:       t.TempDir(),
		Path:       []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin"},
		PathSource: "of the test",
		Exec: func(_ context.Context, path string, args ...string) (string, error) {
			out, ok := n.shims[path]
			if !ok || len(args) != 1 || args[0] != "--version" {
				return "", errors.New("exit status 1")
			}
			return out, nil
		},
	}
	n.in.Daemon = Daemon{Address: "/run/containerd/containerd.sock", Binary: "/usr/bin/containerd", HasPlugin: true, HasCRI: true}
	n.in.Patches = []string{"0001-cri-x", "0004-fsview-read", "0013-transfer-honor-all-directories", "0014-cri-let-pulls-without-a-progress-timeout-end"}
	n.program(shimFile, "ELF")
	n.program("/usr/sbin/mount.fuse", "")
	n.program("/usr/local/bin/nydus-overlayfs-guest-pull", "")
	n.write(kataFile, kataFine)
	n.write(kubeletConfig, kubeletOK)
	n.write(mainFile, "version = 4\nimports = [\"/etc/containerd/conf.d/*.toml\"]\n")
	require.NoError(t, os.MkdirAll(n.in.Host.join(rootDir), 0o700))
	// As `containerd config dump` prints it.
	n.config = `
root = "/var/lib/containerd"
[plugins.'io.containerd.snapshotter.v1.guest-pull']
  root_path = ""
  mount_type = "fuse.nydus-overlayfs-guest-pull"
[plugins.'io.containerd.cri.v1.runtime']
  ignore_image_defined_volumes = true
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata]
    runtime_type = "io.containerd.kata-qemu-coco-dev.v2"
    snapshotter = "guest-pull"
    KATA
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "overlayfs"
  disable_snapshot_annotations = true
  max_concurrent_downloads = 3
  IMAGES
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  snapshotter = "overlayfs"
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  snapshotter = "guest-pull"
MORE
`
	return n
}

func (n *node) write(path, text string) {
	n.t.Helper()
	path = n.in.Host.join(path)
	require.NoError(n.t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(n.t, os.WriteFile(path, []byte(text), 0o644))
}

func (n *node) program(path, text string) {
	n.t.Helper()
	n.write(path, text)
	require.NoError(n.t, os.Chmod(n.in.Host.join(path), 0o755))
}

func (n *node) link(path, another string) {
	n.t.Helper()
	require.NoError(n.t, os.MkdirAll(filepath.Dir(n.in.Host.join(another)), 0o755))
	require.NoError(n.t, os.Symlink(n.in.Host.join(path), n.in.Host.join(another)))
}

func (n *node) remove(path string) {
	n.t.Helper()
	require.NoError(n.t, os.RemoveAll(n.in.Host.join(path)))
}

// set replaces a line of the configuration, or one of its places.
func (n *node) set(place, text string) {
	n.t.Helper()
	require.Contains(n.t, n.config, place)
	n.config = strings.Replace(n.config, place, text, 1)
}

func (n *node) rust(version, conf string) {
	n.shims[shimFile] = fmt.Sprintf(rustShim, version)
	n.write(rustFile, conf)
}

func (n *node) run() Report {
	n.t.Helper()
	text := n.config
	for _, place := range []string{"KATA", "IMAGES", "MORE"} {
		text = strings.Replace(text, place+"\n", "\n", 1)
	}
	if n.in.Config == nil && n.in.ConfigErr == nil {
		c, err := ParseConfig([]byte(text))
		require.NoError(n.t, err)
		c.Path = mainFile
		n.in.Config = c
	}
	return Run(n.t.Context(), n.in)
}

// A node that is in order has no findings, so that each finding below is the
// work of its test alone.
func TestNothingFound(t *testing.T) {
	r := newNode(t).run()
	assert.Empty(t, r.Findings)
	assert.True(t, r.OK())
	assert.Equal(t, []Handler{{
		Name: "kata", RuntimeType: "io.containerd.kata-qemu-coco-dev.v2", Shim: shimFile,
		Flavour: FlavourGo, Version: "4.1.0", KataConfig: kataFile,
	}}, r.Handlers)
}

type wanted struct {
	severity Severity
	check    string
	says     []string // parts of the problem, the reason or the remedy
}

func TestFindings(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(n *node)
		want  []wanted
	}{
		"configuration that does not load": {func(n *node) { n.in.ConfigErr = errors.New("expected version 4 or less") },
			[]wanted{{Error, "config", []string{"expected version 4 or less"}}}},

		"drop-ins not imported": {func(n *node) {
			n.write(mainFile, "version = 4\n")
			n.write(confD+"/50-guest-pull.toml", "version = 4\n[plugins.'io.containerd.snapshotter.v1.guest-pull']\n")
		}, []wanted{{Error, "conf.d", []string{"50-guest-pull.toml is not read", mainFile + " does not import it", `add imports = ["/etc/containerd/conf.d/*.toml"]`}}}},
		"drop-ins that set nothing, not imported": {func(n *node) {
			n.write(mainFile, "version = 4\n")
			n.write(confD+"/50-guest-pull.toml", "version = 4\n# [plugins.'io.containerd.snapshotter.v1.guest-pull']\n")
		}, []wanted{{Warning, "conf.d", []string{"50-guest-pull.toml"}}}},
		"drop-ins without a main file": {func(n *node) {
			n.remove(mainFile)
			n.write(confD+"/50-guest-pull.toml", "version = 4\n[plugins.'io.containerd.snapshotter.v1.guest-pull']\n")
		}, []wanted{{Error, "conf.d", []string{"does not exist", "create " + mainFile}}}},
		"drop-ins imported by an import": {func(n *node) {
			n.write(mainFile, "version = 4\nimports = [\"more.toml\"]\n")
			n.write("/etc/containerd/more.toml", "version = 4\nimports = [\"conf.d/*.toml\", \"config.toml\"]\n")
			n.write(confD+"/50-guest-pull.toml", "version = 4\n[plugins.'io.containerd.snapshotter.v1.guest-pull']\n")
		}, nil},

		"unknown key": {func(n *node) {
			c, err := ParseConfig(nil)
			require.NoError(n.t, err)
			*c = *mustParse(n)
			c.UnknownKeys = []string{"[plugins.'x']: mount_typ"}
			n.in.Config = c
		}, []wanted{{Warning, "unknown-key", []string{"mount_typ"}}}},

		"proxy plugin of the same name": {func(n *node) {
			n.set("MORE", "[proxy_plugins.guest-pull]\ntype = \"snapshot\"\naddress = \"/run/x.sock\"\n")
		}, []wanted{{Error, "proxy-plugin", []string{"/run/x.sock", "id already registered", "remove [proxy_plugins.guest-pull]"}}}},
		"proxy plugin of another kind": {func(n *node) {
			n.set("MORE", "[proxy_plugins.guest-pull]\ntype = \"content\"\naddress = \"/run/x.sock\"\n")
		}, nil},

		"plugin disabled": {func(n *node) { n.config = "disabled_plugins = ['" + PluginURI + "']\n" + n.config },
			[]wanted{{Error, "plugin", []string{"disabled_plugins"}}}},
		"plugin missing in the daemon": {func(n *node) { n.in.Daemon.HasPlugin = false },
			[]wanted{{Error, "plugin", []string{"/usr/bin/containerd", "systemctl cat containerd"}}}},
		"CRI disabled": {func(n *node) { n.config = "disabled_plugins = ['io.containerd.grpc.v1.cri']\n" + n.config },
			[]wanted{{Error, "cri", []string{"io.containerd.grpc.v1.cri is in disabled_plugins"}}}},
		"CRI's part disabled": {func(n *node) { n.config = "disabled_plugins = ['" + runtimeURI + "']\n" + n.config },
			[]wanted{{Error, "cri", []string{"disabled_plugins"}}}},
		"no CRI": {func(n *node) { n.in.Daemon.HasCRI = false }, []wanted{{Error, "cri", []string{"/usr/bin/containerd"}}}},
		"CRI failed": {func(n *node) { n.in.Daemon.CRIErr = "no such option" },
			[]wanted{{Error, "cri", []string{"no such option"}}}},
		"a value with which CRI does not start": {func(n *node) {
			n.set("MORE", "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.other]\nruntime_type = \"io.containerd.other.v2\"\nunresolved_users = \"deny\"\n")
		}, []wanted{{Error, "cri", []string{`handler "other": unresolved_users = "deny"`, "refuse"}}}},
		"a value with which it does": {func(n *node) {
			n.set("MORE", "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.other]\nruntime_type = \"io.containerd.other.v2\"\nunresolved_users = \"refuse\"\n")
		}, nil},
		"a handler whose definition is gone": {func(n *node) {
			n.set("MORE", "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.other]\nsnapshotter = \"guest-pull\"\n")
		}, []wanted{{Error, "shim", []string{`handler "other" has no runtime_type`, "guest-pull disable other"}}}},
		"plugin failed": {func(n *node) { n.in.Daemon.PluginErr = "database is damaged" },
			[]wanted{{Error, "plugin", []string{"database is damaged"}}}},
		"containerd not running": {func(n *node) { n.in.Daemon = Daemon{Address: "/run/c.sock", Err: os.ErrNotExist} },
			[]wanted{{Info, "daemon", []string{"/run/c.sock"}}}},

		"root not absolute": {func(n *node) { n.set(`root_path = ""`, `root_path = "var/lib"`) },
			[]wanted{{Error, "root", []string{`"var/lib"`, "root_path"}}}},
		"root is a file": {func(n *node) { n.remove(rootDir); n.write(rootDir, "") },
			[]wanted{{Error, "root", []string{"not a directory"}}}},
		"root not there yet": {func(n *node) { n.remove("/var/lib/containerd") }, nil},
		"root in use": {func(n *node) {
			n.in.Daemon = Daemon{Address: "x", Err: os.ErrNotExist}
			n.write(rootDir+"/metadata.db", "")
			lock(n.t, n.in.Host.join(rootDir+"/metadata.db"))
		}, []wanted{{Error, "root", []string{"metadata.db open", "fuser"}}, {Info, "daemon", nil}}},
		"root in use by containerd itself": {func(n *node) {
			n.write(rootDir+"/metadata.db", "")
			lock(n.t, n.in.Host.join(rootDir+"/metadata.db"))
		}, nil},
		"root_path in use": {func(n *node) {
			n.in.Daemon = Daemon{Address: "x", Err: os.ErrNotExist}
			n.set(`root_path = ""`, `root_path = "/var/lib/containerd-guest-pull-grpc"`)
			n.write("/var/lib/containerd-guest-pull-grpc/metadata.db", "")
			lock(n.t, n.in.Host.join("/var/lib/containerd-guest-pull-grpc/metadata.db"))
		}, []wanted{{Error, "root", []string{"/var/lib/containerd-guest-pull-grpc/metadata.db"}}, {Info, "daemon", nil}}},

		"no mount.fuse": {func(n *node) { n.remove("/usr/sbin/mount.fuse") },
			[]wanted{{Warning, "mount-helper", []string{"mount.fuse is not in containerd's PATH", "of the test", "install the package fuse3"}}}},
		"no mount.fuse, without the patch": {func(n *node) { n.remove("/usr/sbin/mount.fuse"); n.in.Patches = []string{"0001"} },
			[]wanted{{Error, "mount-helper", []string{"no container of the snapshotter is created"}}}},
		"only mount.fuse3": {func(n *node) { n.remove("/usr/sbin/mount.fuse"); n.program("/usr/sbin/mount.fuse3", "") },
			[]wanted{{Warning, "mount-helper", []string{"ln -s /usr/sbin/mount.fuse3 /usr/sbin/mount.fuse"}}}},
		"no helper": {func(n *node) { n.remove("/usr/local/bin/nydus-overlayfs-guest-pull") },
			[]wanted{{Warning, "mount-helper", []string{"ln -s guest-pull-overlayfs /usr/local/bin/nydus-overlayfs-guest-pull"}}}},
		"helper not executable": {func(n *node) {
			require.NoError(n.t, os.Chmod(n.in.Host.join("/usr/local/bin/nydus-overlayfs-guest-pull"), 0o644))
		}, []wanted{{Warning, "mount-helper", nil}}},
		"helper outside of PATH": {func(n *node) {
			n.set("fuse.nydus-overlayfs-guest-pull", "fuse./opt/nydus-overlayfs-guest-pull")
		}, []wanted{{Warning, "mount-helper", []string{"/opt/nydus-overlayfs-guest-pull", "at this path"}}}},
		"helper by its path": {func(n *node) {
			n.set("fuse.nydus-overlayfs-guest-pull", "fuse./opt/nydus-overlayfs-guest-pull")
			n.program("/opt/nydus-overlayfs-guest-pull", "")
		}, nil},

		"no patches": {func(n *node) { n.in.Patches = nil },
			[]wanted{{Warning, "patches", []string{"RuntimeClassInImageCriApi"}}}},

		"no handler": {func(n *node) { n.set(`snapshotter = "guest-pull"`, "") },
			[]wanted{{Warning, "handlers", []string{"no runtime handler", `containerd guest-pull enable`}}, {Info, "handlers", []string{`"kata" runs Kata with the snapshotter "overlayfs"`}}}},
		"snapshotter for everything": {func(n *node) {
			n.set(`snapshotter = "overlayfs"`, `snapshotter = "guest-pull"`)
			n.program("/usr/bin/containerd-shim-runc-v2", "")
		},
			[]wanted{{Error, "default-snapshotter", []string{"runc's too"}}, {Error, "shim", []string{`"runc" is mapped`}}}},
		"runtime_platforms": {func(n *node) {
			n.set("IMAGES", "[plugins.'io.containerd.cri.v1.images'.runtime_platforms.kata]\nsnapshotter = \"nydus\"\n")
		}, []wanted{{Error, "runtime-platforms", []string{`"nydus"`, "runtime_platforms.kata"}}}},
		"runtime_platforms that agrees": {func(n *node) {
			n.set("IMAGES", "[plugins.'io.containerd.cri.v1.images'.runtime_platforms.kata]\nsnapshotter = \"guest-pull\"\n")
		}, nil},

		"no shim": {func(n *node) { n.remove(shimFile) },
			[]wanted{{Error, "shim", []string{"containerd-shim-kata-qemu-coco-dev-v2 is not found", "runtime_path"}}}},
		"no shim at runtime_path": {func(n *node) { n.set("KATA", `runtime_path = "/opt/kata/bin/containerd-shim-kata-v2"`) },
			[]wanted{{Error, "shim", []string{"/opt/kata/bin/containerd-shim-kata-v2 is not found"}}}},
		"shim beside containerd": {func(n *node) {
			n.remove(shimFile)
			n.in.Daemon.Binary = "/opt/c/containerd"
			n.program("/opt/c/containerd-shim-kata-qemu-coco-dev-v2", "")
			n.shims["/opt/c/containerd-shim-kata-qemu-coco-dev-v2"] = fmt.Sprintf(goShim, "4.0.0")
		}, nil},
		"malformed runtime type": {func(n *node) { n.set("io.containerd.kata-qemu-coco-dev.v2", "kata") },
			[]wanted{{Error, "shim", []string{`"kata"`}}}},
		"runc mapped": {func(n *node) {
			n.set("io.containerd.kata-qemu-coco-dev.v2", "io.containerd.runc.v2")
			n.program("/usr/bin/containerd-shim-runc-v2", "")
		}, []wanted{{Error, "shim", []string{"empty root file system"}}}},
		"another runtime": {func(n *node) {
			n.set("io.containerd.kata-qemu-coco-dev.v2", "io.containerd.runsc.v1")
			n.program("/usr/bin/containerd-shim-runsc-v1", "")
		}, []wanted{{Warning, "shim", []string{"no shim of Kata"}}}},
		"shim of unknown language": {func(n *node) { delete(n.shims, shimFile) },
			[]wanted{{Warning, "shim", []string{"Go or Rust"}}}},

		"Go shim, older helper name": {func(n *node) {
			n.set("fuse.nydus-overlayfs-guest-pull", "fuse.guest-pull-overlayfs")
			n.program("/usr/local/bin/guest-pull-overlayfs", "")
		}, []wanted{{Error, "mount-type", []string{"does not take", "empty root file system", `set mount_type = "fuse.nydus-overlayfs-guest-pull"`}}}},
		"patched Go shim, older helper name": {func(n *node) {
			n.set("fuse.nydus-overlayfs-guest-pull", "fuse.guest-pull-overlayfs")
			n.program("/usr/local/bin/guest-pull-overlayfs", "")
			n.program(shimFile, strings.Repeat("x", 1<<20-7)+"guest-pull-overlayfs")
		}, nil},
		"patched Go shim, default helper": {func(n *node) { n.program(shimFile, "guest-pull-overlayfs") }, nil},
		"Rust shim, older helper name": {func(n *node) {
			n.set("fuse.nydus-overlayfs-guest-pull", "fuse.guest-pull-overlayfs")
			n.program("/usr/local/bin/guest-pull-overlayfs", "")
			n.rust("4.1.0", rustFine)
		}, nil},
		"Go shim of Kata 3.8": {func(n *node) { n.shims[shimFile] = fmt.Sprintf(goShim, "3.8.0") },
			[]wanted{{Error, "mount-type", []string{"Kata 3.8.0", `"fuse.nydus-overlayfs" only`}}}},
		"Go shim of Kata 3.8, exact type": {func(n *node) {
			n.set("fuse.nydus-overlayfs-guest-pull", "fuse.nydus-overlayfs")
			n.program("/usr/local/bin/nydus-overlayfs", "")
			n.shims[shimFile] = fmt.Sprintf(goShim, "3.8.0")
		}, nil},
		"Go shim of Kata 3.2": {func(n *node) { n.shims[shimFile] = fmt.Sprintf(goShim, "3.2.0") },
			[]wanted{{Error, "mount-type", []string{"Kata 3.2.0 cannot pull in the guest"}}}},
		"mount type not for mount.fuse": {func(n *node) { n.set("fuse.nydus-overlayfs-guest-pull", "fuse3.nydus-overlayfs") },
			[]wanted{{Error, "mount-type", []string{"correct mount_type"}}, {Error, "mount-type", []string{"does not take"}}}},

		"Rust shim with a shared file system": {func(n *node) { n.rust("4.1.0", strings.Replace(rustFine, `"none"`, `"virtio-fs"`, 1)) },
			[]wanted{{Error, "shared-fs", []string{`"virtio-fs" in ` + rustFile, `shared_fs = "none"`}}}},
		"Go shim with a shared file system": {func(n *node) { n.write(kataFile, strings.Replace(kataFine, `"none"`, `"virtio-fs"`, 1)) }, nil},
		// An empty value is no absent one: SharedFsInfo::adjust_config in Kata's
		// src/libs/kata-types/src/config/hypervisor/mod.rs.
		"Rust shim, shared_fs empty": {func(n *node) { n.rust("4.1.0", strings.Replace(rustFine, `"none"`, `""`, 1)) },
			[]wanted{{Error, "shared-fs", []string{`shared_fs = "", which the Rust shim takes for "virtio-fs", in ` + rustFile, `shared_fs = "none" in [hypervisor.qemu]`}}}},
		"Rust shim, shared_fs absent": {func(n *node) { n.rust("4.1.0", strings.Replace(rustFine, `shared_fs = "none"`, "", 1)) }, nil},
		// Kata's src/runtime-rs/crates/hypervisor/src/qemu/inner.rs, capabilities.
		"Rust shim, confidential guest with a shared file system": {func(n *node) {
			n.rust("4.1.0", strings.Replace(rustFine, `"none"`, "\"virtio-fs\"\nconfidential_guest = true", 1))
		}, nil},
		"Rust shim, confidential guest, shared_fs empty": {func(n *node) {
			n.rust("4.1.0", strings.Replace(rustFine, `"none"`, "\"\"\nconfidential_guest = true", 1))
		}, nil},
		"Rust shim, no confidential guest with a shared file system": {func(n *node) {
			n.rust("4.1.0", strings.Replace(rustFine, `"none"`, "\"virtio-fs\"\nconfidential_guest = false", 1))
		}, []wanted{{Error, "shared-fs", []string{`"virtio-fs" in ` + rustFile}}}},
		// src/runtime-rs/crates/hypervisor/src/ch/inner_hypervisor.rs, capabilities.
		"Rust shim, confidential guest of Cloud Hypervisor": {func(n *node) {
			n.rust("4.1.0", "[hypervisor.clh]\nshared_fs = \"virtio-fs\"\nconfidential_guest = true\n[runtime]\nhypervisor_name = \"clh\"\n")
		}, nil},
		// src/runtime-rs/crates/hypervisor/src/dragonball/inner.rs, new.
		"Rust shim, Dragonball": {func(n *node) {
			n.rust("4.1.0", "[hypervisor.dragonball]\nshared_fs = \"inline-virtio-fs\"\nconfidential_guest = true\n[runtime]\nhypervisor_name = \"dragonball\"\n")
		}, []wanted{{Error, "shared-fs", []string{`"inline-virtio-fs"`, "[hypervisor.dragonball]"}}}},
		// src/runtime-rs/crates/hypervisor/src/remote/inner.rs, capabilities.
		"Rust shim, remote hypervisor": {func(n *node) {
			n.rust("4.1.0", "[hypervisor.remote]\nshared_fs = \"virtio-fs\"\n[runtime]\nhypervisor_name = \"remote\"\n")
		}, nil},
		// src/runtime-rs/crates/hypervisor/src/firecracker/inner.rs, new.
		"Rust shim, Firecracker": {func(n *node) {
			n.rust("4.1.0", "[hypervisor.firecracker]\nshared_fs = \"virtio-fs\"\n[runtime]\nhypervisor_name = \"firecracker\"\n")
		}, nil},
		"shared_fs in a drop-in": {func(n *node) {
			n.rust("4.1.0", rustFine)
			n.write("/etc/kata-containers/runtime-rs/config.d/50.toml", "[hypervisor.qemu]\nshared_fs = \"\"\n")
		}, []wanted{{Error, "shared-fs", []string{`shared_fs = ""`}}}},

		// The Go shim's key: src/runtime/pkg/katautils/config.go, runtime. What the
		// Rust shim asks: src/runtime-rs/crates/resource/src/manager_inner.rs,
		// handler_rootfs, is_experiment_enabled("force_guest_pull").
		"Rust shim, force guest pull by the Go shim's key": {func(n *node) {
			n.rust("4.1.0", rustFine+"experimental_force_guest_pull = true\n")
		}, []wanted{{Warning, "force-guest-pull", []string{"does not know it", `experimental = ["force_guest_pull"] in [runtime]`}}}},
		"Rust shim, force guest pull by its own key": {func(n *node) {
			n.rust("4.1.0", rustFine+"experimental = [\"force_guest_pull\"]\n")
		}, nil},
		"Go shim, force guest pull": {func(n *node) { n.write(kataFile, kataFine+"experimental_force_guest_pull = true\n") }, nil},

		// The Go shim has no sandbox API: src/runtime/cmd/containerd-shim-kata-v2/main.go.
		"sandboxer shim, Go shim": {func(n *node) { n.set("KATA", "sandboxer = \"shim\"") },
			[]wanted{{Error, "sandboxer", []string{"is the Go one", "remove sandboxer"}}}},
		"sandboxer shim": {func(n *node) {
			n.rust("4.1.0", rustFine)
			n.set("KATA", "sandboxer = \"shim\"\n    disable_pause_image_pull = true")
		}, nil},
		"sandboxer shim, pause image": {func(n *node) {
			n.rust("4.1.0", rustFine)
			n.set("KATA", "sandboxer = \"shim\"")
		}, []wanted{{Info, "pause-image", []string{"disable_pause_image_pull = true"}}}},
		// src/runtime-rs/crates/runtimes/src/manager.rs, sandbox_init_runtime_instance:
		// try_init without options.
		"sandboxer shim, ConfigPath": {func(n *node) {
			n.rust("4.1.0", rustFine)
			n.write("/opt/kata/x.toml", strings.Replace(rustFine, `"none"`, `"virtio-fs"`, 1))
			n.set("KATA", "sandboxer = \"shim\"\n    disable_pause_image_pull = true\n    options = { ConfigPath = \"/opt/kata/x.toml\" }")
		}, []wanted{{Error, "sandboxer", []string{`does not read ConfigPath = "/opt/kata/x.toml"`, "reads is " + rustFile}}}},
		"sandboxer shim, ConfigPath and no default": {func(n *node) {
			n.rust("4.1.0", rustFine)
			n.remove(rustFile)
			n.write("/opt/kata/x.toml", rustFine)
			n.set("KATA", "sandboxer = \"shim\"\n    disable_pause_image_pull = true\n    options = { ConfigPath = \"/opt/kata/x.toml\" }")
		}, []wanted{{Error, "sandboxer", []string{"none that was found", rustFile}}, {Info, "kata-config", nil}}},
		"sandboxer shim, ConfigPath that is the default": {func(n *node) {
			n.rust("4.1.0", rustFine)
			n.set("KATA", "sandboxer = \"shim\"\n    disable_pause_image_pull = true\n    options = { ConfigPath = \""+rustFile+"\" }")
		}, nil},
		"sandboxer podsandbox, ConfigPath": {func(n *node) {
			n.rust("4.1.0", strings.Replace(rustFine, `"none"`, `"virtio-fs"`, 1))
			n.write("/opt/kata/x.toml", rustFine)
			n.set("KATA", "sandboxer = \"podsandbox\"\n    options = { ConfigPath = \"/opt/kata/x.toml\" }")
		}, nil},
		// containerd's plugins/sandbox/controller.go, Create: Runtime.Name is the type.
		"sandboxer shim, runtime_path": {func(n *node) {
			n.program("/opt/kata/bin/containerd-shim-kata-v2", "")
			n.remove(shimFile)
			n.shims["/opt/kata/bin/containerd-shim-kata-v2"] = fmt.Sprintf(rustShim, "4.1.0")
			n.write(rustFile, rustFine)
			n.set("KATA", "sandboxer = \"shim\"\n    disable_pause_image_pull = true\n    runtime_path = \"/opt/kata/bin/containerd-shim-kata-v2\"")
		}, []wanted{{Error, "sandboxer", []string{"containerd-shim-kata-qemu-coco-dev-v2", "does not use runtime_path",
			"ln -s /opt/kata/bin/containerd-shim-kata-v2 /usr/local/bin/containerd-shim-kata-qemu-coco-dev-v2"}}}},
		"sandboxer shim, runtime_path of another shim": {func(n *node) {
			n.program("/opt/kata/bin/containerd-shim-kata-v2", "")
			n.shims["/opt/kata/bin/containerd-shim-kata-v2"] = fmt.Sprintf(rustShim, "4.1.0")
			n.write(rustFile, rustFine)
			n.set("KATA", "sandboxer = \"shim\"\n    disable_pause_image_pull = true\n    runtime_path = \"/opt/kata/bin/containerd-shim-kata-v2\"")
		}, []wanted{{Warning, "sandboxer", []string{"run " + shimFile + " and not /opt/kata/bin/containerd-shim-kata-v2"}}}},
		"sandboxer shim, runtime_path of the same shim": {func(n *node) {
			n.rust("4.1.0", rustFine)
			n.set("KATA", "sandboxer = \"shim\"\n    disable_pause_image_pull = true\n    runtime_path = \""+shimFile+"\"")
		}, nil},
		"sandboxer shim, links to runtime_path and ConfigPath": {func(n *node) {
			n.rust("4.1.0", rustFine)
			n.link(shimFile, "/opt/kata/bin/containerd-shim-kata-v2")
			n.link(rustFile, "/opt/kata/x.toml")
			n.set("KATA", "sandboxer = \"shim\"\n    disable_pause_image_pull = true\n    runtime_path = \"/opt/kata/bin/containerd-shim-kata-v2\"\n    options = { ConfigPath = \"/opt/kata/x.toml\" }")
			n.shims["/opt/kata/bin/containerd-shim-kata-v2"] = n.shims[shimFile]
		}, nil},
		"pause image not pulled": {func(n *node) { n.set("KATA", "disable_pause_image_pull = true") },
			[]wanted{{Error, "pause-image", []string{"without sandboxer", "remove disable_pause_image_pull"}}}},

		"Rust shim, shared file system of the other hypervisor": {func(n *node) {
			n.rust("4.1.0", rustFine+"[hypervisor.clh]\nshared_fs = \"virtio-fs\"\n")
		}, nil},
		"default timeout of Go": {func(n *node) { n.write(kataFile, strings.Replace(kataFine, "600", "60", 1)) },
			[]wanted{{Warning, "create-timeout", []string{"create_container_timeout = 60", "600 in [runtime] of " + kataFile}}}},
		"default timeout of Rust": {func(n *node) { n.rust("4.1.0", strings.Replace(rustFine, "600", "30", 1)) },
			[]wanted{{Warning, "create-timeout", []string{"create_container_timeout = 30", "[agent.kata]"}}}},
		"timeout in a drop-in": {func(n *node) {
			n.write(kataFile, strings.Replace(kataFine, "600", "60", 1))
			n.write("/etc/kata-containers/config.d/50.toml", "[runtime]\ncreate_container_timeout = 500\n")
		}, nil},
		"kubelet's timeout": {func(n *node) { n.write(kubeletConfig, "runtimeRequestTimeout: 0s\n") },
			[]wanted{{Warning, "create-timeout", []string{"kubelet gives up after 2m0s", "runtimeRequestTimeout: 10m0s"}}}},
		"images that need more": {func(n *node) {
			n.in.Daemon.Images = []Image{{"r.example/s:1", 1e6}, {"r.example/l:1", 5e9}, {"r.example/m:1", 3e9}, {"r.example/xs:1", 1}}
		}, []wanted{{Info, "create-timeout", []string{"have 10m0s", "r.example/l:1 (5000 MB), r.example/m:1 (3000 MB), r.example/s:1 (1 MB)", "create_container_timeout = 1800 in [runtime] of " + kataFile, "runtimeRequestTimeout: 30m0s"}}}},
		"images that need more, with kubelet's timeout": {func(n *node) {
			n.write(kubeletConfig, "runtimeRequestTimeout: 5m0s\n")
			n.in.Daemon.Images = []Image{{"r.example/l:1", 5e9}}
		}, []wanted{{Warning, "create-timeout", []string{"kubelet gives up after 5m0s", "r.example/l:1", "runtimeRequestTimeout: 30m0s"}}}},
		"images that do not need more": {func(n *node) { n.in.Daemon.Images = []Image{{"r.example/s:1", 1999e6}} }, nil},
		"no kubelet":                   {func(n *node) { n.remove(kubeletConfig) }, nil},
		"Kata's configuration by ConfigPath": {func(n *node) {
			n.set("KATA", "options = { ConfigPath = \"/opt/kata/x.toml\" }")
			n.write("/opt/kata/x.toml", "[runtime]\ncreate_container_timeout = 10\n")
		}, []wanted{{Warning, "create-timeout", []string{"/opt/kata/x.toml"}}}},
		"Kata's configuration missing": {func(n *node) { n.set("KATA", "options = { ConfigPath = \"/opt/kata/x.toml\" }") },
			[]wanted{{Error, "kata-config", []string{"/opt/kata/x.toml"}}}},
		"Kata's configuration broken": {func(n *node) { n.write(kataFile, "[runtime") },
			[]wanted{{Error, "kata-config", []string{kataFile}}}},
		"no configuration of Kata": {func(n *node) { n.remove(kataFile) },
			[]wanted{{Info, "kata-config", []string{"ConfigPath"}}}},
		"Kata's configuration of kata-deploy": {func(n *node) {
			n.remove(kataFile)
			n.write("/opt/kata/share/defaults/kata-containers/configuration.toml", strings.Replace(kataFine, "600", "5", 1))
		}, []wanted{{Warning, "create-timeout", []string{"/opt/kata/share/defaults"}}}},
		"Kata's configuration of a distribution": {func(n *node) {
			n.remove(kataFile)
			n.write("/usr/share/defaults/kata-containers/configuration.toml", strings.Replace(kataFine, "600", "5", 1))
		}, []wanted{{Warning, "create-timeout", []string{"/usr/share/defaults"}}}},
		"layer fetch": {func(n *node) { n.in.Patches = append(n.in.Patches, "0007-cri-add-disable_layer_fetch-to-runtimes") },
			[]wanted{{Info, "layer-fetch", []string{"disable_layer_fetch = true"}}}},
		"layer fetch set": {func(n *node) {
			n.in.Patches = append(n.in.Patches, "0007-cri-add-disable_layer_fetch-to-runtimes")
			n.set("KATA", "disable_layer_fetch = true")
		}, nil},

		"unpack_config": {func(n *node) {
			n.set("[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n  snapshotter = \"guest-pull\"", "")
		},
			[]wanted{{Error, "unpack-config", []string{"no unpack platforms defined", "remove unpack_config"}}}},
		"unpack_config and local pulls": {func(n *node) {
			n.set("[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n  snapshotter = \"guest-pull\"", "")
			n.set("IMAGES", "use_local_image_pull = true")
		}, []wanted{{Warning, "unpack-config", []string{"ctr and nerdctl"}}}},
		"discard_unpacked_layers": {func(n *node) { n.set("IMAGES", "discard_unpacked_layers = true") },
			[]wanted{{Warning, "discard-unpacked-layers", []string{"remove it"}}}},
		"image volumes": {func(n *node) {
			n.in.Patches = append(n.in.Patches, "0017-cri-leave-image-defined-volumes-out-where-the-image-")
			n.set("ignore_image_defined_volumes = true", "")
		}, nil},
		"image volumes, kept": {func(n *node) {
			n.in.Patches = append(n.in.Patches, "0017-cri-leave-image-defined-volumes-out-where-the-image-")
			n.set("ignore_image_defined_volumes = true", "")
			n.set("KATA", "keep_image_defined_volumes = true")
		}, []wanted{{Warning, "image-volumes", []string{`handler "kata": keep_image_defined_volumes = true`, "remove it"}}}},
		"image volumes, without the patch": {func(n *node) { n.set("ignore_image_defined_volumes = true", "") },
			[]wanted{{Warning, "image-volumes", []string{"VOLUME", "ignore_image_defined_volumes = true"}}}},

		"users out of layers": {func(n *node) { n.set(`root_path = ""`, "root_path = \"\"\n  resolve_users = \"registry\"") },
			[]wanted{{Info, "resolve-users", []string{"host's memory"}}}},

		"mirror": {func(n *node) {
			n.write("/etc/containerd/certs.d/docker.io/hosts.toml", "server = \"https://registry-1.docker.io\"\n[host.\"https://mirror.example\"]\ncapabilities = [\"pull\"]\n")
		}, []wanted{{Warning, "mirrors", []string{"docker.io", "https://mirror.example", "guest-pull guest-config"}}}},
		"mirror with secrets": {func(n *node) {
			n.write("/etc/containerd/certs.d/quay.io/hosts.toml", "server = \"https://u:secret@s.example/%zz\"\n[host.\"https://u:secret@mirror.example/v2/a?t=secret#secret\"]\n[host.\"u:secret@n.example\"]\n")
		}, []wanted{{Warning, "mirrors", []string{"https://mirror.example/v2/a, n.example, (no URL)"}}}},
		"mirror of everything": {func(n *node) {
			n.write("/etc/containerd/certs.d/_default/hosts.toml", "[host.\"https://mirror.example\"]\n")
		},
			[]wanted{{Warning, "mirrors", []string{"all registries"}}}},
		"mirror as server": {func(n *node) {
			n.write("/etc/containerd/certs.d/quay.io/hosts.toml", "server = \"https://mirror.example\"\n")
		},
			[]wanted{{Warning, "mirrors", []string{"quay.io"}}}},
		"mirror in another config_path": {func(n *node) {
			n.set("IMAGES", "registry = { config_path = \"/srv/a:/srv/b\" }")
			n.write("/srv/b/quay.io/hosts.toml", "[host.\"http://mirror.example\"]\n")
		}, []wanted{{Warning, "mirrors", []string{"/srv/b/quay.io"}}}},
		"mirror for the transfer service, which does not read its config_path": {func(n *node) {
			n.set("MORE", "[plugins.'io.containerd.transfer.v1.local']\nconfig_path = \"/srv/t\"\n")
			n.config = strings.Replace(n.config, "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n  snapshotter = \"overlayfs\"\n[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n  snapshotter = \"guest-pull\"\n", "", 1)
			n.config += "\nunpack_config = [{ snapshotter = \"guest-pull\" }]\n"
			n.write("/srv/t/quay.io/hosts.toml", "[host.\"http://mirror.example\"]\n")
		}, nil},
		"hosts.toml in the second directory, without the patch": {func(n *node) {
			n.in.Patches = n.in.Patches[:2]
			n.write("/etc/docker/certs.d/quay.io/hosts.toml", "[host.\"http://mirror.example\"]\n")
		}, []wanted{{Error, "config-path", []string{"/etc/docker/certs.d/quay.io/hosts.toml is not read", `config_path = "/etc/docker/certs.d"`, "use_local_image_pull = true"}}}},
		"hosts.toml in the second directory, without the patch, local pulls": {func(n *node) {
			n.in.Patches = n.in.Patches[:2]
			n.set("IMAGES", "use_local_image_pull = true")
			n.write("/etc/docker/certs.d/quay.io/hosts.toml", "[host.\"http://mirror.example\"]\n")
		}, []wanted{{Warning, "mirrors", []string{"/etc/docker/certs.d/quay.io"}}}},
		"hosts.toml in the one directory, without the patch": {func(n *node) {
			n.in.Patches = n.in.Patches[:2]
			n.set("IMAGES", "registry = { config_path = \"/srv/a\" }")
			n.write("/srv/a/quay.io/hosts.toml", "[host.\"http://mirror.example\"]\n")
		}, []wanted{{Warning, "mirrors", []string{"/srv/a/quay.io"}}}},
		"hosts.toml twice": {func(n *node) {
			n.write("/etc/containerd/certs.d/quay.io/ca.crt", "")
			n.write("/etc/docker/certs.d/quay.io/hosts.toml", "[host.\"http://mirror.example\"]\n")
		}, []wanted{{Warning, "config-path", []string{"/etc/docker/certs.d/quay.io/hosts.toml is not read", "one directory"}}}},
		"hosts.toml behind a default": {func(n *node) {
			n.write("/etc/containerd/certs.d/_default/ca.crt", "")
			n.write("/etc/docker/certs.d/quay.io/hosts.toml", "[host.\"http://mirror.example\"]\n")
		}, []wanted{{Warning, "config-path", []string{"/etc/docker/certs.d/quay.io/hosts.toml is not read", "_default"}}}},
		"no progress timeout": {func(n *node) { n.set("IMAGES", `image_pull_progress_timeout = "0s"`) }, nil},
		"no progress timeout, without the patch": {func(n *node) {
			n.in.Patches = n.in.Patches[:3]
			n.set("IMAGES", `image_pull_progress_timeout = "0s"`)
		}, []wanted{{Error, "progress-timeout", []string{`"0s"`, "pause image"}}}},
		"no progress timeout, without the patch, local pulls": {func(n *node) {
			n.in.Patches = n.in.Patches[:3]
			n.set("IMAGES", "image_pull_progress_timeout = \"0s\"\nuse_local_image_pull = true")
		}, nil},
		"some progress timeout, without the patch": {func(n *node) {
			n.in.Patches = n.in.Patches[:3]
			n.set("IMAGES", `image_pull_progress_timeout = "5m0s"`)
		}, nil},
		"mirror of the old kind": {func(n *node) {
			n.set("IMAGES", "registry = { mirrors = { \"docker.io\" = { endpoint = [\"https://m.example\"] } } }")
		}, []wanted{{Warning, "mirrors", []string{"docker.io", "https://m.example"}}}},
		"mirror with a password": {func(n *node) {
			n.set("IMAGES", "registry = { mirrors = { \"docker.io\" = { endpoint = [\"https://user:secret@m.example\"] } } }")
		}, []wanted{{Warning, "mirrors", []string{"mirror https://m.example"}}}},
		"registry with a certificate of its own": {func(n *node) {
			n.write("/etc/containerd/certs.d/reg.example_5000_/hosts.toml", "server = \"https://reg.example:5000\"\n[host.\"https://reg.example:5000\"]\nca = \"ca.pem\"\n")
		}, []wanted{{Warning, "registry-trust", []string{"reg.example:5000", "guest-pull guest-config"}}}},
		"registry that is itself": {func(n *node) {
			n.write("/etc/containerd/certs.d/docker.io/hosts.toml", "server = \"https://registry-1.docker.io\"\n")
			n.write("/etc/containerd/certs.d/quay.io/hosts.toml", "server = \"https://quay.io\"\n[host.\"https://quay.io\"]\n")
		}, nil},
		"broken hosts.toml": {func(n *node) { n.write("/etc/containerd/certs.d/quay.io/hosts.toml", "[host") },
			[]wanted{{Warning, "mirrors", []string{"cannot be read"}}}},
		"proxy": {func(n *node) { n.in.Host.Env = map[string]string{"HTTPS_PROXY": "http://user:secret@proxy"} },
			[]wanted{{Warning, "proxy", []string{"HTTPS_PROXY", "guest-pull guest-config"}}}},

		"old unit": {func(n *node) { n.write("/etc/systemd/system/guest-pull-snapshotter.service", "") },
			[]wanted{{Warning, "old-unit", []string{"systemctl disable --now guest-pull-snapshotter.service"}}}},
		"old socket and root": {func(n *node) {
			n.write("/run/containerd-guest-pull-grpc/containerd-guest-pull-grpc.sock", "")
			n.write("/var/lib/containerd-guest-pull-grpc/metadata.db", "")
		}, []wanted{{Warning, "old-socket", []string{"rm -r /run/containerd-guest-pull-grpc"}}, {Warning, "old-root", []string{"rm -rf /var/lib/containerd-guest-pull-grpc"}}}},
		"old root taken over": {func(n *node) {
			n.set(`root_path = ""`, `root_path = "/var/lib/containerd-guest-pull-grpc/"`)
			n.write("/var/lib/containerd-guest-pull-grpc/metadata.db", "")
		}, nil},
		"nydus-snapshotter": {func(n *node) {
			n.write("/usr/lib/systemd/system/nydus-snapshotter.service", "")
			n.write("/var/lib/containerd-nydus/x", "")
		}, []wanted{{Warning, "old-unit", []string{"nydus-snapshotter.service"}}, {Warning, "old-root", nil}}},
		"nydus-snapshotter of kata-deploy, in use": {func(n *node) {
			n.write("/etc/systemd/system/nydus-for-kata-tee.service", "")
			n.set("MORE", `[proxy_plugins.nydus-for-kata-tee]
type = "snapshot"
address = "/run/nydus-for-kata-tee/containerd-nydus-grpc.sock"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.other]
runtime_type = "io.containerd.other.v2"
snapshotter = "nydus-for-kata-tee"
`)
		}, nil},

		"k3s with its own containerd": {func(n *node) {
			n.write("/etc/systemd/system/k3s-agent.service", "ExecStart=/usr/local/bin/k3s agent\n")
			n.write("/etc/rancher/k3s/config.yaml", "# container-runtime-endpoint: unix:///run/containerd/containerd.sock\ntoken: secret\n")
		}, []wanted{{Error, "distribution", []string{"k3s-agent.service", "/run/k3s/containerd/containerd.sock",
			"container-runtime-endpoint: unix:///run/containerd/containerd.sock", "/etc/rancher/k3s/config.yaml"}}}},
		"k3s with another one": {func(n *node) {
			n.write("/etc/systemd/system/k3s.service", "")
			n.write("/etc/rancher/k3s/config.yaml", "container-runtime-endpoint: unix:///run/other/containerd.sock\n")
		}, []wanted{{Error, "distribution", []string{"/run/other/containerd.sock"}}}},
		"k3s with this one, in its file": {func(n *node) {
			n.write("/etc/systemd/system/k3s.service", "")
			n.write("/etc/rancher/k3s/config.yaml", "token: x\ncontainer-runtime-endpoint: \"unix:///run/containerd/containerd.sock\"\n")
		}, nil},
		"k3s with this one, in a later file": {func(n *node) {
			n.write("/etc/systemd/system/k3s.service", "")
			n.write("/etc/rancher/k3s/config.yaml", "container-runtime-endpoint: unix:///run/other/containerd.sock\n")
			n.write("/etc/rancher/k3s/config.yaml.d/50-endpoint.yaml", "container-runtime-endpoint: /run/containerd/containerd.sock\n")
		}, nil},
		"k3s with this one, as its installer writes it": {func(n *node) {
			n.write("/etc/systemd/system/k3s.service", "ExecStart=/usr/local/bin/k3s \\\n    server \\\n\t'--container-runtime-endpoint' \\\n\t'unix:///run/containerd/containerd.sock' \\\n\n")
		}, nil},
		"the containerd of k3s is the one that is checked": {func(n *node) {
			n.write("/etc/systemd/system/k3s.service", "")
			n.in.Daemon.Address = "/run/k3s/containerd/containerd.sock"
		}, nil},
		"RKE2 with its own containerd": {func(n *node) { n.write("/usr/local/lib/systemd/system/rke2-agent.service", "") },
			[]wanted{{Error, "distribution", []string{"RKE2", "/etc/rancher/rke2/config.yaml"}}}},
		"MicroK8s with its own containerd": {func(n *node) {
			n.write("/etc/systemd/system/snap.microk8s.daemon-kubelite.service", "")
			n.write("/var/snap/microk8s/current/args/kubelet", "--container-runtime-endpoint=${SNAP_COMMON}/run/containerd.sock\n")
		}, []wanted{{Error, "distribution", []string{"MicroK8s", "/var/snap/microk8s/common/run/containerd.sock"}}}},
		"MicroK8s with this one": {func(n *node) {
			n.write("/etc/systemd/system/snap.microk8s.daemon-kubelite.service", "")
			n.write("/var/snap/microk8s/current/args/kubelet", "--foo=bar\n--container-runtime-endpoint=unix:///run/containerd/containerd.sock\n")
		}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			c.spoil(n)
			r := n.run()
			var got []string
			for _, f := range r.Findings {
				got = append(got, fmt.Sprintf("%s %s", f.Severity, f.Check))
				assert.NotEmpty(t, f.Problem)
				assert.NotEmpty(t, f.Why)
				assert.NotEmpty(t, f.Remedy)
				assert.NotContains(t, f.Problem+f.Why+f.Remedy, "%!", "a format string is wrong")
				assert.NotContains(t, f.Problem+f.Why+f.Remedy, "secret")
			}
			ok := true
			var want []string
			for _, w := range c.want {
				want = append(want, fmt.Sprintf("%s %s", w.severity, w.check))
				ok = ok && w.severity != Error
			}
			require.Equal(t, want, got, "%+v", r.Findings)
			for i, w := range c.want {
				f := r.Findings[i]
				for _, s := range w.says {
					assert.Contains(t, f.Problem+"\n"+f.Why+"\n"+f.Remedy, s)
				}
			}
			assert.Equal(t, ok, r.OK())
		})
	}
}

func mustParse(n *node) *Config {
	text := n.config
	for _, place := range []string{"KATA", "IMAGES", "MORE"} {
		text = strings.Replace(text, place+"\n", "\n", 1)
	}
	c, err := ParseConfig([]byte(text))
	require.NoError(n.t, err)
	c.Path = mainFile
	return c
}

// lock takes a lock as bbolt does. One of the same process on another open file
// counts like another process's.
func lock(t *testing.T, path string) {
	t.Helper()
	f, err := os.Open(path)
	require.NoError(t, err)
	t.Cleanup(func() { f.Close() })
	require.NoError(t, syscall.Flock(int(f.Fd()), syscall.LOCK_EX))
}

// d_type and writability are properties of a mounted file system.
func TestRootFileSystem(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting file systems needs root")
	}
	for name, c := range map[string]struct {
		mount func(t *testing.T, dir string) mount.Mount
		says  string
	}{
		"read-only": {func(*testing.T, string) mount.Mount {
			return mount.Mount{Type: "tmpfs", Source: "tmpfs", Options: []string{"ro"}}
		}, "read-only"},
		"no d_type": {func(t *testing.T, dir string) mount.Mount {
			image := filepath.Join(t.TempDir(), "image")
			out, err := exec.Command("mke2fs", "-q", "-t", "ext4", "-O", "^filetype", image, "8m").CombinedOutput()
			require.NoError(t, err, "%s (mke2fs is in the package e2fsprogs)", out)
			return mount.Mount{Type: "ext4", Source: image, Options: []string{"loop"}}
		}, "without d_type"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			dir := n.in.Host.join(rootDir)
			require.NoError(t, mount.All([]mount.Mount{c.mount(t, dir)}, dir))
			t.Cleanup(func() { require.NoError(t, mount.UnmountAll(dir, 0)) })
			r := n.run()
			require.Len(t, r.Findings, 1)
			assert.Equal(t, "root", r.Findings[0].Check)
			assert.Contains(t, r.Findings[0].Problem, c.says)
		})
	}
}

// What a shim says counts; a shim that says nothing is told by its file; a
// wrapper script by what it runs.
func TestInspectShim(t *testing.T) {
	gofmt, err := exec.LookPath("gofmt")
	require.NoError(t, err)
	goProgram, err := os.ReadFile(gofmt)
	require.NoError(t, err)
	const path = "/opt/kata/bin/containerd-shim-kata-v2"

	for name, c := range map[string]struct {
		content, says string
		flavour       Flavour
		version       string
	}{
		"Go":                       {"", fmt.Sprintf(goShim, "3.14.0"), FlavourGo, "3.14.0"},
		"Go, pre-release":          {"", fmt.Sprintf(goShim, "4.2.0-alpha0"), FlavourGo, "4.2.0-alpha0"},
		"Go, patched":              {"..guest-pull-overlayfs..", fmt.Sprintf(goShim, "3.14.0"), FlavourGoPatched, "3.14.0"},
		"Rust":                     {"guest-pull-overlayfs", fmt.Sprintf(rustShim, "4.1.0"), FlavourRust, "4.1.0"},
		"Go, says nothing":         {string(goProgram), "", FlavourGo, ""},
		"Go, patched and silent":   {string(goProgram) + "guest-pull-overlayfs", "", FlavourGoPatched, ""},
		"Rust, says nothing":       {"\x7fELF /rustc/0123456789abcdef/library/std/src/panicking.rs", "", FlavourRust, ""},
		"another program":          {"\x7fELF", "usage: x\n", FlavourUnknown, ""},
		"a text in two pieces":     {strings.Repeat("x", 1<<20-3) + "/rustc/", "", FlavourRust, ""},
		"another program, no file": {"", "", FlavourUnknown, ""},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			if c.content != "" || c.says != "" {
				n.program(path, c.content)
			}
			if c.says != "" {
				n.shims[path] = c.says
			}
			s := inspectShim(t.Context(), n.in.Host, path)
			assert.Equal(t, c.flavour, s.flavour)
			assert.Equal(t, c.version, s.version.text)
		})
	}

	t.Run("wrapper", func(t *testing.T) {
		n := newNode(t)
		n.shims[path] = fmt.Sprintf(goShim, "3.10.1")
		n.program(path, "")
		n.program(shimFile, "#!/usr/bin/env bash\nKATA_CONF_FILE=/opt/kata/share/x.toml "+path+" \"$@\"\n")
		n.write("/opt/kata/share/x.toml", kataFine)
		r := n.run()
		assert.Empty(t, r.Findings)
		assert.Equal(t, "3.10.1", r.Handlers[0].Version)
		assert.Equal(t, "/opt/kata/share/x.toml", r.Handlers[0].KataConfig)
	})
}

// Programs are run for real, but not for ever, nor with what they leave behind.
func TestExecIsBounded(t *testing.T) {
	h := Host{Path: []string{"/usr/bin", "/bin"}}
	dir := t.TempDir()
	script := func(text string) string {
		p := filepath.Join(dir, "p")
		require.NoError(t, os.WriteFile(p, []byte("#!/bin/sh\n"+text), 0o755))
		return p
	}
	out, err := h.exec(t.Context(), script("echo hello $1"), "--version")
	require.NoError(t, err)
	assert.Equal(t, "hello --version\n", out)
	ctx, cancel := context.WithTimeout(t.Context(), 1)
	defer cancel()
	_, err = h.exec(ctx, script("sleep 60"))
	assert.Error(t, err)
}

func TestRefusesMount(t *testing.T) {
	v := func(major, minor int) version { return version{fmt.Sprintf("%d.%d.0", major, minor), major, minor} }
	const (
		def  = "fuse.nydus-overlayfs-guest-pull"
		abs  = "fuse./usr/local/bin/nydus-overlayfs-guest-pull"
		old  = "fuse.guest-pull-overlayfs"
		nyd  = "fuse.nydus-overlayfs"
		bare = "overlay"
	)
	for _, c := range []struct {
		s     shim
		takes map[string]bool
	}{
		{shim{flavour: FlavourGo}, map[string]bool{def: true, abs: true, nyd: true, old: false, bare: false}},
		{shim{flavour: FlavourGo, version: v(4, 1)}, map[string]bool{def: true, abs: true, nyd: true, old: false, bare: false}},
		{shim{flavour: FlavourGo, version: v(3, 9)}, map[string]bool{def: true, abs: true, nyd: true, old: false}},
		{shim{flavour: FlavourGo, version: v(3, 8)}, map[string]bool{def: false, abs: false, nyd: true, old: false}},
		{shim{flavour: FlavourGo, version: v(3, 3)}, map[string]bool{def: false, nyd: true}},
		{shim{flavour: FlavourGo, version: v(3, 2)}, map[string]bool{def: false, nyd: false}},
		{shim{flavour: FlavourGo, version: v(2, 5)}, map[string]bool{nyd: false}},
		{shim{flavour: FlavourGoPatched, version: v(4, 1)}, map[string]bool{def: true, nyd: true, old: true, bare: false}},
		{shim{flavour: FlavourGoPatched, version: v(3, 8)}, map[string]bool{def: false, nyd: true, old: true}},
		{shim{flavour: FlavourRust, version: v(4, 1)}, map[string]bool{def: true, abs: true, nyd: true, old: true}},
		{shim{flavour: FlavourUnknown}, map[string]bool{old: true}},
	} {
		for mountType, takes := range c.takes {
			remedy := refusesMount(c.s, mountType)
			assert.Equal(t, takes, remedy == "", "%s %s: %s: %s", c.s.flavour, c.s.version.text, mountType, remedy)
		}
	}
}

func TestReports(t *testing.T) {
	n := newNode(t)
	n.remove("/usr/sbin/mount.fuse")
	n.shims[shimFile] = fmt.Sprintf(goShim, "3.2.0")
	r := n.run()

	var table bytes.Buffer
	require.NoError(t, r.WriteTable(&table))
	assert.Contains(t, table.String(), "HANDLER")
	assert.Contains(t, table.String(), "why: ")
	assert.Contains(t, table.String(), "do:  ")
	assert.Contains(t, table.String(), "1 errors, 1 warnings, 0 notes\n")

	var text bytes.Buffer
	require.NoError(t, r.WriteJSON(&text))
	var got map[string]any
	require.NoError(t, json.Unmarshal(text.Bytes(), &got))
	assert.Equal(t, false, got["ok"])
	findings := got["findings"].([]any)
	require.Len(t, findings, 2)
	keys := map[string]bool{}
	for k := range findings[0].(map[string]any) {
		keys[k] = true
	}
	assert.Equal(t, map[string]bool{"severity": true, "check": true, "problem": true, "why": true, "remedy": true}, keys)

	text.Reset()
	require.NoError(t, Report{}.WriteTable(&text))
	assert.Equal(t, "0 errors, 0 warnings, 0 notes\n", text.String())
}

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
	"cmp"
	"fmt"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
)

// kataDefaults are the configuration files that Kata's shims look for, in this
// order, when nothing names one (kata-containers, src/runtime/Makefile and
// src/libs/kata-types/src/config/default.rs; kata-deploy builds with the prefix
// /opt/kata).
var kataDefaults = map[bool][]string{
	false: {
		"/etc/kata-containers/configuration.toml",
		"/usr/share/defaults/kata-containers/configuration.toml",
		"/opt/kata/share/defaults/kata-containers/configuration.toml",
	},
	true: {
		"/etc/kata-containers/runtime-rs/configuration.toml",
		"/usr/share/defaults/kata-containers/runtime-rs/configuration.toml",
		"/opt/kata/share/defaults/kata-containers/runtime-rs/configuration.toml",
	},
}

// kataConfig is the part that matters of a Kata configuration, drop-ins
// included. What is not set is empty.
type kataConfig struct {
	path       string
	hypervisor string
	// sharedFS is nil where the key is absent, which is not the same as "".
	sharedFS     *string
	confidential bool
	// forceGuestPull is the Go shim's switch.
	forceGuestPull bool
	// timeout is create_container_timeout in seconds, timeoutIn the table that
	// has it.
	timeout   int64
	timeoutIn string
}

// kataConfigPath finds a handler's Kata configuration, or returns "". The shim
// gets the runtime options with a container, and not with a sandbox that it makes
// by itself (src/runtime-rs/crates/runtimes/src/manager.rs,
// sandbox_init_runtime_instance and load_config).
func kataConfigPath(h Host, r Runtime, s shim) string {
	if p := r.configPath(); p != "" && r.Sandboxer != sandboxerShim {
		return p
	}
	if s.kataConfFile != "" {
		return s.kataConfFile
	}
	for _, p := range kataDefaults[s.flavour == FlavourRust] {
		if h.exists(p) {
			return p
		}
	}
	return ""
}

func readKataConfig(h Host, path string) (kataConfig, error) {
	merged := map[string]any{}
	dropIns := h.glob(filepath.Join(filepath.Dir(path), "config.d", "*"))
	for _, p := range append([]string{path}, dropIns...) {
		b, err := h.read(p)
		if err != nil {
			return kataConfig{}, err
		}
		var t map[string]any
		if err := toml.Unmarshal(b, &t); err != nil {
			return kataConfig{}, fmt.Errorf("%s: %w", p, err)
		}
		mergeTables(merged, t)
	}

	k := kataConfig{path: path}
	hypervisors := table(merged, "hypervisor")
	name, _ := table(merged, "runtime")["hypervisor_name"].(string)
	if name == "" && len(hypervisors) == 1 {
		for n := range hypervisors {
			name = n
		}
	}
	k.hypervisor = name
	if fs, ok := table(hypervisors, name)["shared_fs"].(string); ok {
		k.sharedFS = &fs
	}
	k.confidential, _ = table(hypervisors, name)["confidential_guest"].(bool)
	k.forceGuestPull, _ = table(merged, "runtime")["experimental_force_guest_pull"].(bool)

	// The Go shim's is in [runtime], the Rust shim's in [agent.kata].
	in := map[string]map[string]any{"runtime": table(merged, "runtime")}
	for n := range table(merged, "agent") {
		in["agent."+n] = table(table(merged, "agent"), n)
	}
	for _, n := range slices.Sorted(maps.Keys(in)) {
		if v, ok := in[n]["create_container_timeout"].(int64); ok {
			k.timeout, k.timeoutIn = v, n
		}
	}
	return k, nil
}

// sharesFS says whether a Rust shim with this configuration has a file system that
// host and guest share, and what shared_fs says. Without the key it has none; ""
// counts as the default, which is virtio-fs (src/libs/kata-types/src/config/hypervisor/mod.rs,
// SharedFsInfo::adjust_config). A confidential guest of QEMU or of Cloud Hypervisor
// gets none in any case, nor does one of a hypervisor that cannot share
// (src/runtime-rs/crates/resource/src/manager_inner.rs, prepare_before_start_vm;
// src/runtime-rs/crates/hypervisor/src, capabilities of each hypervisor).
func (k kataConfig) sharesFS() (fs string, shares bool) {
	if k.sharedFS == nil || *k.sharedFS == "none" {
		return "", false
	}
	switch k.hypervisor {
	case "remote", "firecracker":
		return "", false
	case "qemu", "clh":
		if k.confidential {
			return "", false
		}
	}
	return *k.sharedFS, true
}

func table(t map[string]any, key string) map[string]any {
	sub, _ := t[key].(map[string]any)
	return sub
}

func mergeTables(into, from map[string]any) {
	for k, v := range from {
		sub, isTable := v.(map[string]any)
		old, wasTable := into[k].(map[string]any)
		if isTable && wasTable {
			mergeTables(old, sub)
			continue
		}
		into[k] = v
	}
}

const (
	// kubeletConfig is where kubeadm puts kubelet's configuration.
	kubeletConfig = "/var/lib/kubelet/config.yaml"
	// kubeletDefault is kubelet's own default for runtimeRequestTimeout.
	kubeletDefault = 2 * time.Minute
	// shortTimeout is Kata's default, in seconds. It was made for containers
	// whose image is on the host.
	shortTimeout = 60
)

var runtimeRequestTimeout = regexp.MustCompile(`(?m)^runtimeRequestTimeout:\s*["']?([0-9a-z.]+)`)

// kubeletTimeout is kubelet's runtimeRequestTimeout, or 0 when this host has no
// configuration of kubelet that can be read.
func kubeletTimeout(h Host) time.Duration {
	b, err := h.read(kubeletConfig)
	if err != nil {
		return 0
	}
	m := runtimeRequestTimeout.FindSubmatch(b)
	if m == nil {
		return kubeletDefault
	}
	d, err := time.ParseDuration(string(m[1]))
	if err != nil {
		return 0
	}
	if d == 0 { // kubeadm writes it so
		return kubeletDefault
	}
	return d
}

// checkKata checks the configuration of one handler's Kata.
func (c *checker) checkKata(name string, r Runtime, s shim) (path string) {
	path = kataConfigPath(c.Host, r, s)
	if path == "" {
		c.add(Info, "kata-config", fmt.Sprintf("handler %q: no configuration of Kata was found", name),
			"its shared_fs and timeouts could not be checked",
			"name it: ConfigPath = \"...\" in "+section(runtimeURI, "containerd", "runtimes", name, "options"))
		return ""
	}
	k, err := readKataConfig(c.Host, path)
	if err != nil {
		c.add(Error, "kata-config", fmt.Sprintf("handler %q: the configuration of Kata cannot be read: %v", name, err),
			"the shim cannot read it either, so no pod of the handler starts",
			"correct "+path+", or name another one: ConfigPath in "+section(runtimeURI, "containerd", "runtimes", name, "options"))
		return path
	}
	if fs, shares := k.sharesFS(); s.flavour == FlavourRust && shares {
		is := ""
		if fs == "" {
			is = ", which the Rust shim takes for \"virtio-fs\","
		}
		c.add(Error, "shared-fs", fmt.Sprintf("handler %q: shared_fs = %q%s in %s", name, fs, is, path),
			"the Rust shim takes an image to be pulled in the guest only without a shared file system; with one, the container gets the host's empty root file system",
			fmt.Sprintf("set shared_fs = \"none\" in [hypervisor.%s] of %s, or use a configuration made for guest pull", k.hypervisor, path))
	}
	// The Go shim's: src/runtime/pkg/katautils/config.go, runtime. The Rust shim's:
	// src/runtime-rs/crates/resource/src/manager_inner.rs, handler_rootfs.
	if s.flavour == FlavourRust && k.forceGuestPull {
		c.add(Warning, "force-guest-pull", fmt.Sprintf("handler %q: experimental_force_guest_pull = true in %s", name, path),
			"it is the Go shim's key; the Rust shim does not know it and says nothing. Images of this snapshotter are pulled in the guest without it",
			fmt.Sprintf("remove it from %s; the key that has the effect, for handlers with another snapshotter, is experimental = [\"force_guest_pull\"] in [runtime]", path))
	}
	enough, largest := c.enoughTime()
	timeout, kubelet := time.Duration(k.timeout)*time.Second, kubeletTimeout(c.Host)
	limit := timeout
	if kubelet > 0 {
		limit = min(limit, kubelet)
	}
	raise := fmt.Sprintf("set create_container_timeout = %d in [%s] of %s, and runtimeRequestTimeout: %s in kubelet's configuration (%s)",
		int(enough.Seconds()), k.timeoutIn, path, enough, kubeletConfig)
	switch {
	case k.timeout <= 0:
	case k.timeout <= shortTimeout:
		c.add(Warning, "create-timeout", fmt.Sprintf("handler %q: create_container_timeout = %d (seconds) in %s", name, k.timeout, path),
			fmt.Sprintf("the guest pulls and unpacks an image within it; a pod whose image takes longer fails, at each try anew (%d s is Kata's default, made for images on the host)%s", k.timeout, largest),
			raise)
	case kubelet > 0 && kubelet < timeout:
		c.add(Warning, "create-timeout", fmt.Sprintf("handler %q: kubelet gives up after %s, before create_container_timeout = %d (seconds) in %s is over", name, kubelet, k.timeout, path),
			"the lower one counts: a pod whose image takes longer to pull in the guest fails"+largest,
			fmt.Sprintf("set runtimeRequestTimeout: %s in %s and restart kubelet", max(timeout, enough), kubeletConfig))
	case limit < enough-10*time.Minute:
		c.add(Info, "create-timeout", fmt.Sprintf("handler %q: containers have %s to start, and large images may need more", name, limit),
			"the guest pulls and unpacks the image in that time"+largest, raise)
	}
	return path
}

// enoughTime is how long the start of a container may have to take on this node,
// which is what containerd advises too when it was not enough
// (internal/cri/server/container_start_guest.go, after patches/containerd), and the
// images that it is for.
func (c *checker) enoughTime() (enough time.Duration, largest string) {
	images := slices.SortedStableFunc(slices.Values(c.Daemon.Images), func(a, b Image) int { return cmp.Compare(b.Bytes, a.Bytes) })
	if len(images) == 0 {
		return 10 * time.Minute, ""
	}
	var list []string
	for _, i := range images {
		list = append(list, fmt.Sprintf("%s (%d MB)", i.Name, (i.Bytes+1e6-1)/1e6))
	}
	return 10 * time.Minute * time.Duration(1+images[0].Bytes/2e9), "; the largest images of the node are " + strings.Join(list[:min(3, len(list))], ", ")
}

func (s shim) describe() string {
	d := s.path
	if s.version.known() {
		d += " (Kata " + s.version.text + ")"
	}
	return strconv.Quote(d)
}

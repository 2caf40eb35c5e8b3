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
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// Flavour is the language of a Kata shim, on which depends how it recognizes the
// mount of a guest-pulled image.
type Flavour string

const (
	// FlavourGo is Kata's Go shim as it is released.
	FlavourGo Flavour = "go"
	// FlavourGoPatched is a Go shim that knows guest-pull-overlayfs as well.
	FlavourGoPatched Flavour = "go-patched"
	// FlavourRust is runtime-rs.
	FlavourRust Flavour = "rust"
	// FlavourUnknown is a program of which nothing could be found out.
	FlavourUnknown Flavour = "unknown"
)

// shim is what was found out about a shim's program.
type shim struct {
	path    string // as containerd runs it
	program string // the shim itself, if path is a wrapper script
	flavour Flavour
	version version
	// kataConfFile is KATA_CONF_FILE as a wrapper script sets it.
	kataConfFile string
}

// version is a version of Kata Containers; the zero value is unknown.
type version struct {
	text         string
	major, minor int
}

func (v version) known() bool { return v.text != "" }

func (v version) before(major, minor int) bool {
	return v.major < major || v.major == major && v.minor < minor
}

// The helper that only a patched Go shim knows.
const patchedHelper = "guest-pull-overlayfs"

var (
	// kataVersion matches what Kata's shims print for --version
	// (kata-containers, src/runtime/cmd/containerd-shim-kata-v2/main.go and
	// src/runtime-rs/crates/shim/src/bin/main.rs).
	kataVersion = regexp.MustCompile(`containerd shim \((Golang|Rust)\).*version: v?(\d+)\.(\d+)([^,\s]*)`)

	wrapped  = regexp.MustCompile(`(/[\w./+-]*containerd-shim-kata[\w-]*-v2)`)
	confFile = regexp.MustCompile(`KATA_CONF_FILE=["']?([\w./+-]+)`)
)

// shimPath finds a handler's shim as containerd does (core/runtime/v2/shim_manager.go,
// resolveRuntimePath). It returns what was looked for when there is none.
func shimPath(h Host, r Runtime, daemon string) (path, wanted string) {
	name := r.Path
	if name == "" {
		name = r.Type
	}
	if filepath.IsAbs(name) {
		if h.exists(name) {
			return name, ""
		}
		return "", name
	}
	parts := strings.Split(name, ".")
	if len(parts) < 2 || strings.Contains(name, "/") {
		return "", strconv.Quote(name) + " (want a name like io.containerd.kata.v2, or a path)"
	}
	binary := "containerd-shim-" + parts[len(parts)-2] + "-" + parts[len(parts)-1]
	if p := h.lookPath(binary); p != "" {
		return p, ""
	}
	if daemon != "" && h.exists(filepath.Join(filepath.Dir(daemon), binary)) {
		return filepath.Join(filepath.Dir(daemon), binary), ""
	}
	return "", binary
}

// inspectShim finds out what a shim is: from what it says about itself and, if it
// says nothing, from its file.
func inspectShim(ctx context.Context, h Host, path string) shim {
	s := shim{path: path, program: path, flavour: FlavourUnknown}
	// kata-deploy of Kata 3 installs scripts that set the configuration and
	// run the shim.
	if head := h.head(path, 4096); bytes.HasPrefix(head, []byte("#!")) {
		if m := confFile.FindSubmatch(head); m != nil {
			s.kataConfFile = string(m[1])
		}
		if m := wrapped.FindSubmatch(head); m != nil && string(m[1]) != path {
			s.program = string(m[1])
		}
	}
	if out, err := h.exec(ctx, s.program, "--version"); err == nil {
		if m := kataVersion.FindStringSubmatch(out); m != nil {
			s.flavour = FlavourRust
			if m[1] == "Golang" {
				s.flavour = FlavourGo
			}
			s.version.text = m[2] + "." + m[3] + m[4]
			s.version.major, _ = strconv.Atoi(m[2]) // digits
			s.version.minor, _ = strconv.Atoi(m[3]) // digits
		}
	}
	if s.flavour == FlavourUnknown {
		s.flavour = h.language(s.program)
	}
	if s.flavour == FlavourGo && h.contains(s.program, patchedHelper) {
		s.flavour = FlavourGoPatched
	}
	return s
}

func (h Host) head(path string, n int64) []byte {
	f, err := os.Open(h.join(path))
	if err != nil {
		return nil
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, n))
	if err != nil {
		return nil
	}
	return b
}

// language tells a Go program by the magic of its build information (package
// debug/buildinfo, which would add 120 KB to containerd), and a Rust program by the
// paths of its standard library, which its panics print.
func (h Host) language(path string) Flavour {
	if h.contains(path, "\xff Go buildinf:") {
		return FlavourGo
	}
	if h.contains(path, "/rustc/") {
		return FlavourRust
	}
	return FlavourUnknown
}

// contains searches a file, which may be large, for a text.
func (h Host) contains(path, text string) bool {
	f, err := os.Open(h.join(path))
	if err != nil {
		return false
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	keep := 0
	for {
		n, err := f.Read(buf[keep:])
		have := buf[:keep+n]
		if bytes.Contains(have, []byte(text)) {
			return true
		}
		if err != nil {
			return false
		}
		keep = copy(buf, have[max(0, len(have)-len(text)+1):])
	}
}

// refusesMount says what to do about a shim that does not take a mount of a type
// for an image that it has to pull in the guest, and "" for one that does. The rule is Kata's
// (src/runtime/virtcontainers/kata_agent.go, IsNydusRootFSType; its history by
// the project's tags).
func refusesMount(s shim, mountType string) (remedy string) {
	if s.flavour == FlavourRust || s.flavour == FlavourUnknown {
		return ""
	}
	helper, ok := strings.CutPrefix(mountType, "fuse.")
	base := filepath.Base(helper)
	const set = "set mount_type = %q in " + "[plugins.'" + PluginURI + "']"
	switch {
	case s.version.known() && s.version.before(3, 3):
		return fmt.Sprintf("Kata %s cannot pull in the guest: install Kata 3.9 or later", s.version.text)
	case s.version.known() && s.version.before(3, 9) && mountType == "fuse.nydus-overlayfs":
		return ""
	case ok && s.flavour == FlavourGoPatched && strings.HasPrefix(base, patchedHelper):
		return ""
	case s.version.known() && s.version.before(3, 9):
		return fmt.Sprintf("the Go shim of Kata %s knows the type \"fuse.nydus-overlayfs\" only: install Kata 3.9 or later, or "+set+
			" and install guest-pull-overlayfs as nydus-overlayfs", s.version.text, "fuse.nydus-overlayfs")
	case ok && strings.HasPrefix(base, "nydus-overlayfs"):
		return ""
	case s.flavour == FlavourGoPatched:
		return fmt.Sprintf("the Go shim knows types whose helper is named nydus-overlayfs... or guest-pull-overlayfs...: "+set, "fuse.nydus-overlayfs-guest-pull")
	default:
		return fmt.Sprintf("the Go shim knows types whose helper is named nydus-overlayfs... only: "+set, "fuse.nydus-overlayfs-guest-pull")
	}
}

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
	"fmt"
	"path/filepath"
)

// checkSandboxer checks who makes the sandboxes of a handler's pods, and whether
// that one can. kataConfig is the file that the shim reads, or "".
func (c *checker) checkSandboxer(name string, r Runtime, s shim, kataConfig string) {
	where := section(runtimeURI, "containerd", "runtimes", name)
	if r.Sandboxer != sandboxerShim {
		if r.Sandboxer == "" || r.Sandboxer == "podsandbox" {
			c.checkPause(name, r, where)
		}
		return
	}
	// Kata's Go shim serves containerd's task API alone
	// (src/runtime/cmd/containerd-shim-kata-v2/main.go, shimapi.Run of containerd 1.x);
	// the Rust shim serves the sandbox API too
	// (src/runtime-rs/crates/service/src/manager.rs, registry_service).
	if s.flavour == FlavourGo || s.flavour == FlavourGoPatched {
		c.add(Error, "sandboxer", fmt.Sprintf("handler %q: sandboxer = \"shim\", and the shim %s is the Go one", name, s.describe()),
			"it does not have containerd's sandbox API: no pod of the handler starts (\"unimplemented\")",
			"remove sandboxer from "+where)
		return
	}
	// containerd starts the shim of a sandbox by the handler's type alone
	// (plugins/sandbox/controller.go, Create; core/runtime/v2/shim_manager.go,
	// resolveRuntimePath), and those of its containers by runtime_path.
	if r.Path != "" {
		byType := r
		byType.Path = ""
		found, wanted := shimPath(c.Host, byType, c.Daemon.Binary)
		switch {
		case found == "":
			c.add(Error, "sandboxer", fmt.Sprintf("handler %q: sandboxer = \"shim\", and %s, which its runtime_type stands for, is not found", name, wanted),
				fmt.Sprintf("containerd does not use runtime_path (%s) for such a sandbox, so no pod of the handler starts", r.Path),
				fmt.Sprintf("ln -s %s /usr/local/bin/%s, and remove runtime_path from %s; or remove sandboxer there", r.Path, filepath.Base(wanted), where))
		case !c.Host.same(found, r.Path):
			c.add(Warning, "sandboxer", fmt.Sprintf("handler %q: sandboxer = \"shim\", so pods run %s and not %s, which runtime_path names", name, found, r.Path),
				"containerd does not use runtime_path for such a sandbox: if the two differ, the pods are not made by the shim that was meant",
				"remove runtime_path from "+where+", and install the shim that is meant at "+found)
		}
	}
	if p := r.configPath(); p != "" && !c.Host.same(p, kataConfig) && s.flavour == FlavourRust {
		reads := kataConfig
		if reads == "" {
			reads = "none that was found"
		}
		c.add(Error, "sandboxer", fmt.Sprintf("handler %q: sandboxer = \"shim\", so the shim does not read ConfigPath = %q", name, p),
			fmt.Sprintf("runtime options do not reach a sandbox that the shim makes; the configuration that it reads is %s, which may be another hypervisor's", reads),
			fmt.Sprintf("remove sandboxer from %s; or make %s the configuration that is meant", where, kataDefaults[true][0]))
	}
	if !r.DisablePauseImagePull {
		c.add(Info, "pause-image", fmt.Sprintf("handler %q: sandboxer = \"shim\" without disable_pause_image_pull", name),
			"containerd pulls the pause image for each such pod that nothing will run; a pod fails when the registry does not answer, and leaves its shim behind",
			"set disable_pause_image_pull = true in "+where)
	}
}

// checkPause: a sandbox of containerd's own is a container of the pause image
// (internal/cri/server/podsandbox/sandbox_run.go, Start), which is then not pulled.
func (c *checker) checkPause(name string, r Runtime, where string) {
	if r.DisablePauseImagePull {
		c.add(Error, "pause-image", fmt.Sprintf("handler %q: disable_pause_image_pull = true without sandboxer = \"shim\"", name),
			"the sandbox is a container of the pause image, which is not pulled for this snapshotter: pods fail unless somebody else pulled it",
			"remove disable_pause_image_pull from "+where)
	}
}

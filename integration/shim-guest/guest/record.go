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

package guest

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/mount"
)

// Record is what the guest writes down of a container that it created, for
// tests to look at.
type Record struct {
	Namespace string  `json:"namespace"`
	ID        string  `json:"id"`
	SandboxID string  `json:"sandbox_id,omitempty"`
	Sandbox   bool    `json:"sandbox"`
	Flavour   Flavour `json:"flavour"`

	// SandboxAPI says that the shim made the sandbox by itself: there is no
	// container, and no Mount, for it. MachinePID is the process that stands in
	// for the virtual machine.
	SandboxAPI bool `json:"sandbox_api,omitempty"`
	MachinePID int  `json:"machine_pid,omitempty"`

	// Mount is the root file system that the host asked for, and Volume what
	// its option says.
	Mount  mount.Mount `json:"mount"`
	Volume Volume      `json:"volume"`

	// Image is what the guest pulled; nil for a sandbox.
	Image *Image `json:"image,omitempty"`

	// HostChainID is the chain ID that the host resolved, when it said so.
	HostChainID string `json:"host_chain_id,omitempty"`

	// HostManifest is the digest of the manifest that the host chose, and
	// HostLayersSize what its layers have in bytes, when it said so.
	HostManifest   string `json:"host_manifest,omitempty"`
	HostLayersSize string `json:"host_layers_size,omitempty"`

	// ShimPID is the process that holds the guest, and MountNamespace what
	// /proc/<ShimPID>/ns/mnt links to.
	ShimPID        int    `json:"shim_pid"`
	MountNamespace string `json:"mount_namespace"`
}

// RecordPath is where the record of a container is, under Config.RecordDir.
func RecordPath(dir, namespace, id string) string {
	return filepath.Join(dir, namespace, id+".json")
}

// ReadRecord reads the record of a container. Without one the error is
// fs.ErrNotExist.
func ReadRecord(dir, namespace, id string) (Record, error) {
	var r Record
	b, err := os.ReadFile(RecordPath(dir, namespace, id))
	if err != nil {
		return Record{}, fmt.Errorf("read the record of container %s: %w", id, err)
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return Record{}, fmt.Errorf("read the record of container %s: %w", id, err)
	}
	return r, nil
}

// Write puts the record under dir; with no dir it does nothing. A reader sees
// the whole record or none.
func (r Record) Write(dir string) error {
	if dir == "" {
		return nil
	}
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("write the record of container %s: %w", r.ID, err)
	}
	path := RecordPath(dir, r.Namespace, r.ID)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("write the record of container %s: %w", r.ID, err)
	}
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("write the record of container %s: %w", r.ID, err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("write the record of container %s: %w", r.ID, err)
	}
	return nil
}

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

package hostile

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/guest-pull/guest-pull-snapshotter/integration/figures"
	"github.com/guest-pull/guest-pull-snapshotter/plugin/users"
)

// What the reading of one image may cost. The memory is that of the whole process,
// a test program with the layers in files, twice: Go collects garbage when as much
// as is in use has come to it.
const (
	maxMemory  = 320 << 20
	maxCPU     = 90 * time.Second
	maxLatency = 2 * time.Second // of the answer to the end of a deadline, on a busy machine
)

// result is what a child says.
type result struct {
	Error    string
	Unusable bool
	Latency  time.Duration
	Memory   string
}

const childEnv = "GUEST_PULL_HOSTILE_IMAGE"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		if err := child(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// child reads an image, first with a deadline and then to the end.
func child(dir string) error {
	b, err := os.ReadFile(filepath.Join(dir, "layers.json"))
	if err != nil {
		return err
	}
	var layers []users.Layer
	if err := json.Unmarshal(b, &layers); err != nil {
		return err
	}
	fetch := func(_ context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
		f, err := os.Open(filepath.Join(dir, desc.Digest.Encoded()))
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("%s: %w", desc.Digest, errdefs.ErrNotFound)
		}
		return f, err
	}
	// What counts for it are the writable pages of the process. It needs neither
	// privileges nor cgroups.
	if err := unix.Setrlimit(unix.RLIMIT_DATA, &unix.Rlimit{Cur: maxMemory, Max: maxMemory}); err != nil {
		return err
	}
	cpu := uint64(maxCPU.Seconds())
	if err := unix.Setrlimit(unix.RLIMIT_CPU, &unix.Rlimit{Cur: cpu, Max: cpu}); err != nil {
		return err
	}

	const deadline = 100 * time.Millisecond
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	start := time.Now()
	_, _, _ = users.Read(ctx, layers, fetch)
	r := result{Latency: time.Since(start) - deadline}
	if _, _, err := users.Read(context.Background(), layers, fetch); err != nil {
		r.Error, r.Unusable = err.Error(), errors.Is(err, users.ErrUnusable)
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	_, most, _ := strings.Cut(string(status), "VmHWM:")
	r.Memory, _, _ = strings.Cut(strings.TrimSpace(most), "\n")
	return json.NewEncoder(os.Stdout).Encode(r)
}

// Reading an image costs memory and time within limits, whatever the image is made
// of, and what goes wrong is said. Errors that lie in the image and others are told
// apart.
func TestImages(t *testing.T) {
	self, err := os.Executable()
	require.NoError(t, err)
	for _, name := range slices.Sorted(maps.Keys(Images)) {
		t.Run(name, func(t *testing.T) {
			image := Images[name]()
			dir := t.TempDir()
			var layers []users.Layer
			for _, l := range image.Layers {
				layers = append(layers, users.Layer{Descriptor: l.Desc, DiffID: l.DiffID})
				if l.Blob != nil {
					require.NoError(t, os.WriteFile(filepath.Join(dir, l.Desc.Digest.Encoded()), l.Blob, 0o600))
				}
			}
			b, err := json.Marshal(layers)
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(filepath.Join(dir, "layers.json"), b, 0o600))

			cmd := exec.CommandContext(t.Context(), self)
			cmd.Env = append(os.Environ(), childEnv+"="+dir)
			var stderr strings.Builder
			cmd.Stderr = &stderr
			out, err := cmd.Output()
			require.NoErrorf(t, err, "%.2000s", stderr.String())
			var r result
			require.NoError(t, json.Unmarshal(out, &r))

			cpu := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
			t.Logf("%d bytes: %s, %s, %s after a deadline: %s", size(image), r.Memory, cpu.Round(time.Millisecond), r.Latency, r.Error)
			assert.Less(t, r.Latency, maxLatency)
			if image.Error == "" {
				assert.Empty(t, r.Error)
			} else {
				assert.Contains(t, r.Error, image.Error)
			}
			ours := image.Error == "not found" || image.Error == "data loss" || image.Error == "diff ID"
			assert.Equal(t, image.Error != "" && !ours, r.Unusable)
			assert.NoError(t, figures.Add(figures.Hostile, 1))
		})
	}
}

func size(i Image) (n int) {
	for _, l := range i.Layers {
		n += len(l.Blob)
	}
	return n
}

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

package integration_test

import (
	"encoding/base64"
	"net/url"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
	"github.com/guest-pull/guest-pull-snapshotter/integration/shim-guest/guest"
)

// Host and guest each bring their own credentials and trust their own
// certificates. Neither passes anything secret on to the other: nothing of a
// password is in any file of the node but the guest's own configuration.
func TestPrivateRegistry(t *testing.T) {
	const user, password = "user", "pass:word/%ä-4711"
	for scheme, auth := range map[string]registry.Option{
		"basic": registry.WithBasicAuth(user, password),
		"token": registry.WithTokenAuth(user, password),
	} {
		t.Run(scheme, func(t *testing.T) {
			reg := newRegistry(t, registry.WithTLS(), auth)
			// Sandboxes are not pulled with a pod's credentials.
			open := newRegistry(t)
			pause, err := images.Pause()
			require.NoError(t, err)
			pauseRef, err := open.Push("pause:1", pause)
			require.NoError(t, err)
			n := harness.New(t, harness.Options{
				Registry:   reg,
				PauseImage: pauseRef,
				Guest: guest.Config{Registries: map[string]guest.Registry{
					reg.Host(): {Username: user, Password: password},
				}},
			})
			img := push(t, reg, images.Spec{Name: "app", Layers: 3})
			pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})

			_, err = pod.Pull(t.Context(), img.Ref)
			require.ErrorContains(t, err, "authoriz")
			require.ErrorContains(t, err, img.Ref)
			wrong := &runtimeapi.AuthConfig{Username: user, Password: "not" + password}
			_, err = pod.Create(t.Context(), harness.ContainerSpec{Image: img.Ref, Auth: wrong})
			require.Error(t, err)
			require.NotContains(t, err.Error(), password)
			require.Empty(t, reg.Log().OK().Of(registry.Manifest, registry.Config, registry.Layer))

			right := &runtimeapi.AuthConfig{Username: user, Password: password}
			c := run(t, pod, harness.ContainerSpec{Image: img.Ref, Auth: right})
			requireRuns(t, c, img)
			requireInGuest(t, n, reg, c, img)
			require.Empty(t, reg.Log().By(registry.Host).Of(registry.Layer))

			err = filepath.WalkDir(n.Dir(), func(path string, d os.DirEntry, err error) error {
				if err != nil || !d.Type().IsRegular() || filepath.Base(path) == "guest.json" {
					return err
				}
				text, err := os.ReadFile(path)
				for _, secret := range []string{
					password,
					url.QueryEscape(password),
					base64.StdEncoding.EncodeToString([]byte(user + ":" + password)),
				} {
					assert.NotContains(t, string(text), secret, path)
				}
				return err
			})
			require.NoError(t, err)
		})
	}
}

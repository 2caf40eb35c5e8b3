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
package cluster_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/cluster"
	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
	"github.com/guest-pull/guest-pull-snapshotter/integration/shim-guest/guest"
)

const (
	user = "alice"
	// Of such characters that it stands out wherever it is written.
	password = "s3cret-pa$$word/with+signs:and=more"
	wrong    = "wr0ng-pa$$word/with+signs:and=more"
)

// The host needs credentials for the manifest and the config, and has those of
// the pod; the guest needs some for the layers, and has its own. Whoever lacks
// them, the pod's author learns of which image and why, and nobody else learns
// the credentials.
func TestAuthentication(t *testing.T) {
	for _, scheme := range []struct {
		name string
		auth func(string, string) registry.Option
	}{{"basic", registry.WithBasicAuth}, {"token", registry.WithTokenAuth}} {
		t.Run(scheme.name, func(t *testing.T) {
			private := newRegistry(t, scheme.auth(user, password))
			// For a guest that has no credentials.
			elsewhere := newRegistry(t, scheme.auth(user, password))
			n := newNode(t, options{Options: harness.Options{
				Guest: guest.Config{Registries: map[string]guest.Registry{private.Host(): {Username: user, Password: password}}},
			}})
			pullSecret(t, "right", user, password, private, elsewhere)
			pullSecret(t, "wrong", user, wrong, private, elsewhere)
			pod := func(name, handler, secret string, img image) *corev1.Pod {
				p := n.Pod(scheme.name+"-"+name, handler, main(img))
				if secret != "" {
					p.Spec.ImagePullSecrets = []corev1.LocalObjectReference{{Name: secret}}
				}
				return p
			}
			img := push(t, private, images.Spec{Name: "private", Layers: 3})

			t.Run("absent and wrong", func(t *testing.T) {
				record(t, authentication, scheme.name+" auth, imagePullSecrets absent or wrong: the event names the image and says that access was denied")
				for _, secret := range []string{"", "wrong"} {
					p := pod("guest-refused"+secret, harness.Guest, secret, img)
					n.create(t, p)
					event := n.waitEvent(t, p.Name, "Warning Failed", img.Ref)
					require.Regexp(t, `401 Unauthorized|authorization failed|access denied`, event)
					n.wait(t, p.Name, "waiting for its image", func(p *corev1.Pod) bool {
						s := p.Status.ContainerStatuses
						return len(s) == 1 && s[0].State.Waiting != nil &&
							(s[0].State.Waiting.Reason == "ErrImagePull" || s[0].State.Waiting.Reason == "ImagePullBackOff")
					})
					n.delete(t, p.Name)
				}
				require.Empty(t, private.Log().By(registry.Guest))
			})
			t.Run("right", func(t *testing.T) {
				record(t, authentication, scheme.name+" auth, imagePullSecrets right: guest and runc pods run, no layer for the guest pod on the host")
				p := pod("guest", harness.Guest, "right", img)
				n.run(t, p)
				n.requireRuns(t, p.Name, "main", img)
				require.Empty(t, private.Log().By(registry.Host).Of(registry.Layer))
				require.ElementsMatch(t, img.Layers, private.Log().By(registry.Guest).Of(registry.Layer).OK().References())
				p = pod("runc", harness.Runc, "right", img)
				n.run(t, p)
				n.requireRuns(t, p.Name, "main", img)
			})
			t.Run("present", func(t *testing.T) {
				record(t, authentication, scheme.name+" auth: a pod without imagePullSecrets does not get an image that is there because another pod had them")
				p := pod("guest-free-rider", harness.Guest, "", img)
				n.create(t, p)
				event := n.waitEvent(t, p.Name, "Warning Failed", img.Ref)
				require.Regexp(t, `401 Unauthorized|authorization failed|access denied`, event)
			})
			t.Run("guest", func(t *testing.T) {
				record(t, authentication, scheme.name+" auth, the guest has no credentials: the event says that it is the guest that was refused")
				other := push(t, elsewhere, images.Spec{Name: "elsewhere", Layers: 3})
				p := pod("guest-without", harness.Guest, "right", other)
				n.create(t, p)
				event := n.waitEvent(t, p.Name, "Warning Failed", "guest", "elsewhere")
				require.Regexp(t, `401|UNAUTHORIZED|unauthorized`, event)
				n.delete(t, p.Name)
			})
			t.Run("secrets", func(t *testing.T) {
				record(t, authentication, scheme.name+" auth: no credentials in any file, log, label, annotation, event or mount option of the node")
				requireNoSecret(t, n)
			})
		})
	}
}

// pullSecret makes a secret for imagePullSecrets.
func pullSecret(t *testing.T, name, user, password string, registries ...*registry.Registry) {
	t.Helper()
	type entry struct {
		Username string `json:"username"`
		Password string `json:"password"`
	}
	auths := map[string]entry{}
	for _, r := range registries {
		auths[r.Host()] = entry{user, password}
	}
	text, err := json.Marshal(map[string]any{"auths": auths})
	require.NoError(t, err)
	require.NoError(t, control.API.Create(t.Context(), &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: cluster.Namespace},
		Type:       corev1.SecretTypeDockerConfigJson,
		Data:       map[string][]byte{corev1.DockerConfigJsonKey: text},
	}))
	t.Cleanup(func() { assert.NoError(t, control.API.DeleteSecret(context.Background(), name)) })
}

// requireNoSecret looks for the passwords, plain and encoded, in every file of
// the node: containerd's databases, which have all labels and annotations; its
// logs, which have all mount options; kubelet's files and log; the pods' logs.
func requireNoSecret(t *testing.T, n *node) {
	t.Helper()
	var secrets [][]byte
	for _, p := range []string{password, wrong} {
		quoted, err := json.Marshal(p)
		require.NoError(t, err)
		secrets = append(secrets, []byte(p), bytes.Trim(quoted, `"`),
			[]byte(base64.StdEncoding.EncodeToString([]byte(p))),
			[]byte(base64.StdEncoding.EncodeToString([]byte(user+":"+p))))
	}
	files := 0
	err := filepath.WalkDir(n.Node.Dir(), func(path string, d fs.DirEntry, err error) error {
		if os.IsNotExist(err) {
			return nil // of a pod that goes away
		}
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		if filepath.Base(path) == "guest.json" {
			return nil // the guest's own credentials, which the test gave it
		}
		b, err := os.ReadFile(path)
		if os.IsNotExist(err) {
			return nil
		}
		files++
		for _, s := range secrets {
			if bytes.Contains(b, s) {
				t.Errorf("%s contains a password", path)
			}
		}
		return err
	})
	require.NoError(t, err)
	require.Greater(t, files, 20, "hardly a file was looked at")
	list, err := control.API.Pods(t.Context(), n.Name)
	require.NoError(t, err)
	for _, p := range list {
		events, err := control.API.Events(t.Context(), p.Name)
		require.NoError(t, err)
		text, err := json.Marshal([]any{p, events})
		require.NoError(t, err)
		for _, s := range secrets {
			require.NotContains(t, string(text), string(s))
		}
	}
}

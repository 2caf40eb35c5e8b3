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
	"cmp"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
)

func withPolicy(img image, policy corev1.PullPolicy) corev1.Container {
	c := main(img)
	c.ImagePullPolicy = policy
	return c
}

// Each pull policy is another sequence of kubelet's calls.
func TestPullPolicies(t *testing.T) {
	n := newNode(t, options{})
	kinds := []string{harness.Guest, harness.Runc}
	for _, policy := range []corev1.PullPolicy{corev1.PullIfNotPresent, corev1.PullAlways} {
		for first, handler := range kinds {
			name := strings.ToLower(string(policy)) + "-" + handler
			t.Run(name, func(t *testing.T) {
				record(t, compatibility, fmt.Sprintf("imagePullPolicy %s, %s and %s pods in turn, first %s", policy, kinds[0], kinds[1], handler))
				img := n.push(t, images.Spec{Name: name, Layers: 3, User: "1000:1000"})
				for i := range 4 {
					pod := fmt.Sprintf("%s-%d", name, i)
					n.run(t, n.Pod(pod, kinds[(first+i)%2], withPolicy(img, policy)))
					n.requireRuns(t, pod, "main", img)
					require.Equal(t, "1000\n", n.exec(t, pod, "main", "id", "-u"))
					n.requireNoWarnings(t, pod)
				}
			})
		}
	}

	t.Run("never", func(t *testing.T) {
		record(t, compatibility, "imagePullPolicy Never: an image that is there for guest pods is not there for runc pods, until it is pulled for them")
		img := n.push(t, images.Spec{Name: "never", Layers: 3, User: "1000:1000"})
		n.run(t, n.Pod("never-pulls", harness.Guest, main(img)))
		n.run(t, n.Pod("never-guest", harness.Guest, withPolicy(img, corev1.PullNever)))
		n.requireRuns(t, "never-guest", "main", img)
		require.Equal(t, 1, n.pulls(img))

		n.create(t, n.Pod("never-runc", harness.Runc, withPolicy(img, corev1.PullNever)))
		n.waitEvent(t, "never-runc", "ErrImageNeverPull", img.Ref)
		require.Equal(t, 1, n.pulls(img))
		n.run(t, n.Pod("never-runc-pulls", harness.Runc, main(img)))
		n.waitReady(t, "never-runc")
		n.requireRuns(t, "never-runc", "main", img)
		require.Equal(t, "1000\n", n.exec(t, "never-runc", "main", "id", "-u"))
	})
}

// Pods of both kinds that come at the same moment want the same images, and the
// pause image, of a node that has none.
func TestSeveralAtOnce(t *testing.T) {
	record(t, compatibility, "eight pods of both kinds at once, two images that share layers, on a new node")
	n := newNode(t, options{})
	imgs := []image{
		n.push(t, images.Spec{Name: "one", Layers: 4, User: "1000:1000"}),
		n.push(t, images.Spec{Name: "two", Layers: 6, User: "1000:1000"}),
	}
	require.Equal(t, imgs[0].Layers[0], imgs[1].Layers[0], "the images share no layer")
	var names []string
	for i := range 4 {
		for _, handler := range []string{harness.Guest, harness.Runc} {
			name := fmt.Sprintf("at-once-%d-%s", i, handler)
			n.create(t, n.Pod(name, handler, main(imgs[i%2])))
			names = append(names, name)
		}
	}
	for i, name := range names {
		n.waitReady(t, name)
		n.requireRuns(t, name, "main", imgs[i/2%2])
		require.Equal(t, "1000\n", n.exec(t, name, "main", "id", "-u"))
	}
}

// The users and groups of a container are those of the image and of the pod's
// security context, and never root's because something was not found: kubelet
// takes an image that it does not find for one of root's. Kubelet passes on an
// image's uid, not its group, so containerd looks into the image for the group
// and for supplementary ones. Where the host has the image, for a runc pod, they are as
// under runc, whatever the settings. Where it has none of it, they are so with
// resolve_users; else the group is that of USER, and it is 0 and the others are missing
// only if neither USER nor the pod gives them.
func TestUsers(t *testing.T) {
	yes := true
	i64 := func(i int64) *int64 { return &i }
	cases := []struct {
		name, what, user string
		security         corev1.PodSecurityContext
		// runAsGroup is the container's: containerd refuses that of a pod that
		// does not give runAsUser too.
		runAsGroup *int64
		// uid:gid and all groups, under runc, and, where the host does not have the
		// image, in a guest by default, and in a guest with resolve_users if that is
		// not as under runc.
		runc, guest, resolved string
	}{
		{name: "root", what: "no USER", runc: "0:0 0", guest: "0:0 0"},
		{name: "numeric", what: "USER 1000:1000", user: "1000:1000",
			runc: "1000:1000 1000 2000", guest: "1000:1000 1000"},
		{name: "nonroot", what: "USER 1000:1000 and runAsNonRoot", user: "1000:1000",
			security: corev1.PodSecurityContext{RunAsNonRoot: &yes},
			runc:     "1000:1000 1000 2000", guest: "1000:1000 1000"},
		{name: "number", what: "USER 1000", user: "1000",
			runc: "1000:1000 1000 2000", guest: "1000:0 0"},
		// Without an entry in /etc/passwd the group would be 0.
		{name: "unlisted", what: "USER 5000:6000, a user that /etc/passwd does not have", user: "5000:6000",
			runc: "5000:0 0", guest: "5000:6000 6000", resolved: "5000:6000 6000"},
		{name: "group", what: "USER 1000:1000 and runAsGroup", user: "1000:1000",
			runAsGroup: i64(1000),
			runc:       "1000:1000 1000 2000", guest: "1000:1000 1000"},
		{name: "groups", what: "USER 1000:1000, runAsGroup, fsGroup and supplementalGroups", user: "1000:1000",
			security:   corev1.PodSecurityContext{FSGroup: i64(3000), SupplementalGroups: []int64{4000}},
			runAsGroup: i64(1000),
			runc:       "1000:1000 1000 2000 3000 4000", guest: "1000:1000 1000 3000 4000"},
		{name: "given", what: "runAsUser and runAsGroup over USER by name", user: "app",
			security: corev1.PodSecurityContext{RunAsUser: i64(1234), RunAsGroup: i64(5678)},
			runc:     "1234:5678 5678", guest: "1234:5678 5678"},
		{name: "name", what: "USER by name", user: "app", runc: "1000:1000 1000 2000"},
	}
	for _, resolve := range []string{"off", "registry"} {
		t.Run(resolve, func(t *testing.T) {
			n := newNode(t, options{Options: harness.Options{PluginConfig: "resolve_users = '" + resolve + "'"}})
			for _, c := range cases {
				if resolve == "registry" {
					c.guest = cmp.Or(c.resolved, c.runc)
				}
				if c.guest == "" {
					continue // see below
				}
				t.Run(c.name, func(t *testing.T) {
					outcome := "both orders: as under runc"
					if c.guest != c.runc {
						outcome = "first guest: " + c.guest + ", under runc, and in a guest after it, " + c.runc
					}
					record(t, compatibility, fmt.Sprintf("users, resolve_users %s: %s, %s", resolve, c.what, outcome))
					for _, order := range [][]string{{harness.Guest, harness.Runc}, {harness.Runc, harness.Guest}} {
						img := n.push(t, images.Spec{Name: c.name + "-" + order[0] + "-first", Layers: 2, User: c.user})
						for _, handler := range order {
							p := n.Pod(img.Name+"-"+handler, handler, main(img))
							p.Spec.SecurityContext = &c.security
							p.Spec.Containers[0].SecurityContext = &corev1.SecurityContext{RunAsGroup: c.runAsGroup}
							p.Spec.Volumes = []corev1.Volume{{Name: "shared", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}}
							p.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "shared", MountPath: "/shared"}}
							n.run(t, p)
							want := c.runc
							if order[0] == harness.Guest && handler == harness.Guest {
								want = c.guest
							}
							require.Equal(t, want, ids(t, n, p.Name), "of %s", p.Name)
							n.requireNoWarnings(t, p.Name)
							if c.security.FSGroup != nil {
								n.exec(t, p.Name, "main", "touch", "/shared/file")
								require.Equal(t, "3000\n", n.exec(t, p.Name, "main", "stat", "-c", "%g", "/shared/file"))
							}
							n.delete(t, p.Name)
						}
					}
				})
			}
			if resolve == "registry" {
				return
			}

			t.Run("name", func(t *testing.T) {
				record(t, compatibility, "users, resolve_users off: USER by name: the event has the securityContext that makes it run, and that does")
				img := n.push(t, images.Spec{Name: "by-name", Layers: 2, User: "app"})
				n.create(t, n.Pod("by-name", harness.Guest, main(img)))
				event := n.waitEvent(t, "by-name", "Warning", "app", "securityContext", "runAsUser", "runAsGroup")
				require.Contains(t, event, img.Ref)
				p, err := control.API.Pod(t.Context(), "by-name")
				require.NoError(t, err)
				require.Nil(t, p.Status.ContainerStatuses[0].State.Running)
				require.Nil(t, p.Status.ContainerStatuses[0].State.Terminated, "the container ran, as whoever")

				fixed := n.Pod("by-name-fixed", harness.Guest, main(img))
				fixed.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsUser: i64(1000), RunAsGroup: i64(1000)}
				n.run(t, fixed)
				require.Equal(t, "1000:1000 1000", ids(t, n, "by-name-fixed"))
				n.run(t, n.Pod("by-name-runc", harness.Runc, main(img)))
				require.Equal(t, "1000:1000 1000 2000", ids(t, n, "by-name-runc"))
			})

			t.Run("group by name", func(t *testing.T) {
				record(t, compatibility, "users, resolve_users off: USER 1000:app: the event has the securityContext that makes it run")
				img := n.push(t, images.Spec{Name: "group-by-name", Layers: 2, User: "1000:app"})
				n.create(t, n.Pod("group-by-name", harness.Guest, main(img)))
				n.waitEvent(t, "group-by-name", "Warning", "runAsUser: 1000", `runAsGroup: <GID of "app" in the image>`)
			})

			t.Run("refused", func(t *testing.T) {
				record(t, compatibility, "users: runAsNonRoot and an image of root's: refused, under both kinds")
				img := n.push(t, images.Spec{Name: "of-root", Layers: 2})
				for _, handler := range []string{harness.Guest, harness.Runc} {
					p := n.Pod("of-root-"+handler, handler, main(img))
					p.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsNonRoot: &yes}
					n.create(t, p)
					n.waitEvent(t, p.Name, "image will run as root")
				}
			})
		})
	}
}

// ids are the user, the group and all groups of a pod's container.
func ids(t *testing.T, n *node, pod string) string {
	t.Helper()
	return strings.TrimSpace(n.exec(t, pod, "main", "sh", "-c", `echo "$(id -u):$(id -g) $(id -G)"`))
}

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
package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
)

// KubeletOptions says what is special about a kubelet.
type KubeletOptions struct {
	// Config is merged over the KubeletConfiguration (kubelet.config.k8s.io/v1beta1),
	// key by key at the top level.
	Config map[string]any
}

// Kubelet is a kubelet and the Kubernetes node that it makes of a
// [harness.Node].
type Kubelet struct {
	// Name is the name of the Kubernetes node.
	Name string
	// Node is the containerd that it uses.
	Node *harness.Node

	control *Control
	dir     string
	port    string
	config  map[string]any
	client  *http.Client
	turn    net.Listener
	undo    host
	process *program
}

// StartKubelet starts a kubelet on a node's containerd and returns when its node
// is registered. The caller has to Close it, before the node and the control
// plane.
//
// Kubelet has a few paths that cannot be chosen: it makes links in
// /var/log/containers and a socket in /var/lib/kubelet/device-plugins. It also
// sets sysctls. [Kubelet.Up] and [Kubelet.Close] take that back. On a machine that has a kubelet
// already it would disturb that one, and is refused; for the one of another run
// of the tests it waits.
func (c *Control) StartKubelet(ctx context.Context, n *harness.Node, o KubeletOptions) (_ *Kubelet, err error) {
	turn, err := takeTurn(ctx)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			turn.Close()
		}
	}()
	if conn, err := net.Dial("unix", devicePlugins+"/kubelet.sock"); err == nil {
		conn.Close()
		return nil, errors.New("this machine runs a kubelet already, and " + devicePlugins + " is for one only; run the tests on another machine")
	}
	c.kubelets++
	// A kubelet that is named by an address takes that for the address of its
	// node; so each one has an address of its own, all of them on loopback.
	ip := net.IPv4(127, 0, 1, byte(c.kubelets))
	k := &Kubelet{Name: ip.String(), Node: n, control: c, turn: turn, dir: filepath.Join(n.Dir(), "k")}
	if err := os.Mkdir(k.dir, 0o700); err != nil {
		return nil, err
	}
	if k.undo, err = saveHost(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, k.Close(context.WithoutCancel(ctx)))
		}
	}()
	if k.port, err = freePort(ip); err != nil {
		return nil, err
	}
	if k.client, err = c.kubeletClient(); err != nil {
		return nil, err
	}
	if err := errors.Join(
		c.ca.server("kubelet-"+k.Name, ip),
		makeCgroup(n.CgroupParent()),
		k.writeKubeconfig(),
	); err != nil {
		return nil, err
	}
	port, err := strconv.Atoi(k.port)
	if err != nil {
		return nil, err
	}
	k.config = map[string]any{
		"apiVersion":               "kubelet.config.k8s.io/v1beta1",
		"kind":                     "KubeletConfiguration",
		"containerRuntimeEndpoint": "unix://" + n.Socket(),
		"address":                  ip.String(),
		"port":                     port,
		"healthzPort":              0,
		"tlsCertFile":              c.ca.crt("kubelet-" + k.Name),
		"tlsPrivateKeyFile":        c.ca.keyFile("kubelet-" + k.Name),
		"authentication": map[string]any{
			"anonymous": map[string]any{"enabled": false},
			"webhook":   map[string]any{"enabled": false},
			"x509":      map[string]any{"clientCAFile": c.ca.crt("ca")},
		},
		"authorization":   map[string]any{"mode": "AlwaysAllow"},
		"podLogsDir":      k.PodLogs(),
		"volumePluginDir": filepath.Join(k.dir, "volumeplugins"),
		// Where pods and their limits go; the node's own cgroups are left alone.
		"cgroupRoot":             n.CgroupParent(),
		"cgroupDriver":           "cgroupfs",
		"enforceNodeAllocatable": []string{},
		"failCgroupV1":           false,
		"failSwapOn":             false,
		"makeIPTablesUtilChains": false,
		// What the machine happens to have free must not decide a test.
		"evictionHard": map[string]string{
			"memory.available": "1Mi", "nodefs.available": "1Mi", "nodefs.inodesFree": "1",
			"imagefs.available": "1Mi", "imagefs.inodesFree": "1",
		},
		"imageGCHighThresholdPercent": 100,
		"imageGCLowThresholdPercent":  99,
		// A change of the node's status is seen sooner.
		"nodeStatusUpdateFrequency": "2s",
	}
	maps.Copy(k.config, o.Config)
	return k, k.Up(ctx)
}

// Up starts kubelet, and returns when it serves and its node is there.
func (k *Kubelet) Up(ctx context.Context) error {
	if k.process != nil {
		return errors.New("kubelet is running already")
	}
	text, err := json.MarshalIndent(k.config, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(k.join("kubelet.json"), text, 0o600); err != nil {
		return err
	}
	k.process, err = start(k.control.bin.path("kubelet"), k.join("kubelet.log"),
		"--config="+k.join("kubelet.json"),
		"--kubeconfig="+k.join("kubeconfig"),
		"--hostname-override="+k.Name,
		"--root-dir="+k.join("root"),
		"--cert-dir="+k.join("pki"),
		"--v=4",
	)
	if err != nil {
		return err
	}
	err = k.process.wait(ctx, startTimeout, func(ctx context.Context) error {
		if _, err := k.get(ctx, "/healthz"); err != nil {
			return err
		}
		node, err := k.control.API.Node(ctx, k.Name)
		if err == nil && node.Status.NodeInfo.ContainerRuntimeVersion == "" {
			err = errors.New("the node has no status yet")
		}
		if err != nil {
			return err
		}
		// The last thing that its container manager starts.
		conn, err := net.Dial("unix", devicePlugins+"/kubelet.sock")
		if err == nil {
			conn.Close()
		}
		return err
	})
	// Its container manager has set them, and does so only once. Nothing here
	// depends on them, so the machine need not wait for Close to have its own.
	err = errors.Join(err, k.undo.restoreSysctls())
	if err != nil {
		err = errors.Join(err, k.Down())
	}
	return err
}

// Down stops kubelet. Pods keep running.
func (k *Kubelet) Down() error {
	err := k.process.stop()
	k.process = nil
	return err
}

// Configure changes the configuration, as KubeletOptions.Config does, for the
// next start; nil stands for kubelet's default. It returns what it replaced.
func (k *Kubelet) Configure(config map[string]any) (old map[string]any) {
	old = map[string]any{}
	for key := range config {
		old[key] = k.config[key]
	}
	maps.Copy(k.config, config)
	maps.DeleteFunc(k.config, func(_ string, v any) bool { return v == nil })
	return old
}

// PodLogs is the directory of the pods' logs.
func (k *Kubelet) PodLogs() string { return k.join("pods") }

// Root is kubelet's own directory.
func (k *Kubelet) Root() string { return k.join("root") }

func (k *Kubelet) join(name string) string { return filepath.Join(k.dir, name) }

// LogTail returns the last lines of kubelet's log.
func (k *Kubelet) LogTail(lines int) string {
	return (&program{log: k.join("kubelet.log")}).logTail(lines)
}

// get reads from kubelet's own server.
func (k *Kubelet) get(ctx context.Context, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+net.JoinHostPort(k.Name, k.port)+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := k.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("kubelet: GET %s: %s: %s", path, resp.Status, b)
	}
	return b, err
}

// Get reads a JSON document from kubelet's own server, such as /stats/summary.
func (k *Kubelet) Get(ctx context.Context, path string, into any) error {
	b, err := k.get(ctx, path)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, into)
}

// Pod makes a pod that runs on the node without a scheduler and a network
// plugin. The handler is a RuntimeClass; for harness.Runc there is none.
func (k *Kubelet) Pod(name, handler string, containers ...corev1.Container) *corev1.Pod {
	grace := int64(2)
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: Namespace},
		Spec: corev1.PodSpec{
			NodeName:                      k.Name,
			HostNetwork:                   true,
			Tolerations:                   []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
			TerminationGracePeriodSeconds: &grace,
			Containers:                    containers,
		},
	}
	if handler != harness.Runc {
		p.Spec.RuntimeClassName = &handler
	}
	return p
}

// DeletePods deletes all pods of the node and waits until they are gone.
func (k *Kubelet) DeletePods(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for {
		pods, err := k.control.API.Pods(ctx, k.Name)
		if err == nil && len(pods) == 0 {
			return nil
		}
		var left []string
		for _, p := range pods {
			left = append(left, p.Name)
			if p.DeletionTimestamp == nil {
				if delErr := k.control.API.DeletePod(ctx, p.Name, 2*time.Second); delErr != nil && !IsNotFound(delErr) {
					err = errors.Join(err, delErr)
				}
			}
		}
		select {
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("pods that kubelet does not remove: %s", strings.Join(left, ", ")), err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// Leftovers lists what kubelet has of pods, when it should have none: volumes,
// mounts, directories. Logs are not among them: see [Kubelet.Logs].
func (k *Kubelet) Leftovers() ([]string, error) {
	found, err := filepath.Glob(k.join("root/pods/*"))
	if err != nil {
		return nil, err
	}
	mounts, err := k.mounts()
	if err != nil {
		return nil, err
	}
	for _, m := range mounts {
		if m.Mountpoint != k.Root() { // kubelet's own, while it runs
			found = append(found, "mount "+m.Mountpoint)
		}
	}
	return found, nil
}

// Logs lists the directories of the pods' logs. Kubelet keeps those of a deleted
// pod, and its sandbox, until it collects garbage, which it does each minute.
func (k *Kubelet) Logs() ([]string, error) { return filepath.Glob(filepath.Join(k.PodLogs(), "*")) }

func (k *Kubelet) mounts() ([]*mountinfo.Info, error) {
	return mountinfo.GetMounts(mountinfo.PrefixFilter(k.dir))
}

// Close stops kubelet, removes its node and its files, and gives the machine
// back as it was. The pods have to be gone before.
func (k *Kubelet) Close(ctx context.Context) error {
	errs := []error{k.Down()}
	if err := k.control.API.deleteNode(ctx, k.Name); err != nil && !IsNotFound(err) {
		errs = append(errs, err)
	}
	mounts, err := k.mounts()
	errs = append(errs, err)
	for _, m := range slices.Backward(mounts) {
		errs = append(errs, unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW))
	}
	errs = append(errs, k.undo.restore(k.dir))
	if os.Getenv("GUEST_PULL_KEEP") == "" {
		errs = append(errs, os.RemoveAll(k.dir))
	}
	k.turn.Close()
	return errors.Join(errs...)
}

// takeTurn waits until no other run of the tests has a kubelet. The name is in the
// kernel only, and free again when its owner ends, however that happens.
func takeTurn(ctx context.Context) (net.Listener, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	for {
		l, err := net.Listen("unix", "@guest-pull-test-kubelet")
		if err == nil || !errors.Is(err, unix.EADDRINUSE) {
			return l, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("another run of the Kubernetes tests has a kubelet: %w", ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (k *Kubelet) writeKubeconfig() error {
	return os.WriteFile(k.join("kubeconfig"), []byte(k.control.kubeconfig(k.control.ca.crt("ca"))), 0o600)
}

// kubeconfig is a kubelet's; ca is the path of the authority's certificate there.
func (c *Control) kubeconfig(ca string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: test
contexts: [{name: test, context: {cluster: test, user: test}}]
clusters: [{name: test, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: test, user: {token: %q}}]
`, c.API.url, ca, c.token)
}

// makeCgroup makes a cgroup in each hierarchy; kubelet wants its root to exist.
func makeCgroup(path string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range mounts {
		if err := os.Mkdir(filepath.Join(m.Mountpoint, path), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

const devicePlugins = "/var/lib/kubelet/device-plugins"

// host is what kubelet changes of the machine, as it was before.
type host struct {
	sysctls map[string][]byte
	missing []string // directories
}

func saveHost() (host, error) {
	h := host{sysctls: map[string][]byte{}}
	// setupKernelTunables in kubernetes pkg/kubelet/cm/container_manager_linux.go
	for _, name := range []string{
		"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
		"kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
	} {
		b, err := os.ReadFile("/proc/sys/" + name)
		if err != nil {
			return h, err
		}
		h.sysctls[name] = b
	}
	// The deepest first.
	for _, dir := range []string{devicePlugins, "/var/lib/kubelet", containerLogs} {
		if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
			h.missing = append(h.missing, dir)
		} else if err != nil {
			return h, err
		}
	}
	return h, nil
}

const containerLogs = "/var/log/containers"

func (h host) restoreSysctls() error {
	var errs []error
	for name, value := range h.sysctls {
		errs = append(errs, os.WriteFile("/proc/sys/"+name, value, 0))
	}
	return errors.Join(errs...)
}

// restore undoes what a kubelet with files in dir has done.
func (h host) restore(dir string) error {
	errs := []error{h.restoreSysctls()}
	links, err := filepath.Glob(containerLogs + "/*.log")
	errs = append(errs, err)
	for _, l := range links {
		if target, err := os.Readlink(l); err == nil && strings.HasPrefix(target, dir+"/") {
			errs = append(errs, os.Remove(l))
		}
	}
	for _, name := range []string{"kubelet.sock", "kubelet_internal_checkpoint", "DEPRECATION"} {
		if err := os.Remove(filepath.Join(devicePlugins, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	for _, d := range h.missing {
		if err := syscall.Rmdir(d); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove %s, which was not there before: %w", d, err))
		}
	}
	return errors.Join(errs...)
}
